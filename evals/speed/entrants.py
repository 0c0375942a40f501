"""Who takes part in a comparison: `--against` read, checked, and what each engine needs made ready."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from ...errors import AssetError, ConfigError, did_you_mean
from .entry import Entry

HF_DTYPES = ("float32", "bfloat16", "float16")

_NEEDED = {"llama.cpp": ("llama_cpp", "pip install 'ropewalk[llama-cpp]'")}


def parse_against(text: str) -> list[tuple[str, str | None]]:
    """Peers with the dtype asked for, or None for the usual ones: "hf,llama.cpp:q8_0" names one of each.

    Raises:
        ConfigError: no such peer or dtype, or its package is not installed.
    """
    from ...engine.exports.gguf_write import GGUF_DTYPES

    known = {"hf": HF_DTYPES, "llama.cpp": tuple(GGUF_DTYPES)}
    asked = []
    for part in text.split(","):
        kind, colon, dtype = part.strip().partition(":")
        if kind not in known:
            raise ConfigError(f"unknown peer {kind!r}.{did_you_mean(kind, known)}")
        if colon and dtype not in known[kind]:
            raise ConfigError(f"unknown dtype {dtype!r} of {kind}.{did_you_mean(dtype, known[kind])}")
        if kind in _NEEDED:
            module, command = _NEEDED[kind]
            if importlib.util.find_spec(module) is None:
                raise ConfigError(f"{kind} is not installed; {command}, or leave it out of --against")
        asked.append((kind, dtype or None))
    return asked


def entrants(
    model: str, asked: Sequence[tuple[str, str | None]], *, dtype: str, context: int, room: int, threads: int
) -> list[Entry]:
    """Ropewalk and then the peers, each once; GGUF files that are missing are written into the cache.

    Args:
        model: as `load` takes it.
        asked: from `parse_against`. Without a dtype, llama.cpp runs in bf16 and q8_0; hf in bfloat16, in the dtype
            that ropewalk was given, and in float32 on a CPU without bfloat16 arithmetic.
        dtype: ropewalk's, or "auto".

    Raises:
        RopewalkError: the model cannot be had, or not be written to GGUF.
    """
    import torch

    from ...engine.exports.gguf_write import cached_gguf

    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = model_folder(model)
    entries = [("ropewalk", dtype, model)]
    for kind, one in asked:
        for found in [one] if one else _usual(kind, dtype, device):
            source = str(cached_gguf(folder, found)) if kind == "llama.cpp" else str(folder)
            entries.append((kind, found, source))
    return [
        Entry(kind=kind, dtype=one, source=source, context=context, room=room, threads=threads, device=device)
        for kind, one, source in dict.fromkeys(entries)
    ]


def _usual(kind: str, dtype: str, device: str) -> list[str]:
    from ...engine.load import cpu_has_bfloat16

    if kind == "llama.cpp":
        return ["bf16", "q8_0"]
    usual = {"bfloat16", dtype} & {*HF_DTYPES}
    if device == "cpu" and not cpu_has_bfloat16():
        usual.add("float32")
    return sorted(usual)


def model_folder(model: str) -> Path:
    """The folder of a model's checkpoint; one from the hub is downloaded, or found in the hub's cache.

    Raises:
        AssetError: there is no such model.
    """
    from ...engine.checkpoints.source import resolve

    source = resolve(model)
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.jinja", "*.model"]
    try:
        return Path(snapshot_download(source, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise AssetError(
            f"{model!r} is not a built-in model, a folder or a .gguf file, and the hub did not give it ({reason}); "
            "check the name, or give the folder of a model that is here"
        ) from error
