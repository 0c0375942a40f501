"""The export to llama.cpp and Ollama: where a GGUF file is written, and how to start them."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

from ...errors import AssetError
from ..storage import make_room, new_folder

__all__ = ["GGUF_TARGETS", "serve_command", "write_for"]

GGUF_TARGETS = ("llama.cpp", "ollama")
"""Targets that read GGUF files."""

_MODEL_FILE = "model.gguf"


def write_for(target: str, out: Path, length: int, needed: int, write: Callable[[Path], object]) -> None:
    """Call `write` with the path of the GGUF file: `out` for llama.cpp; a file in the new folder `out`, beside a
    Modelfile, for Ollama.

    Args:
        length: tokens that Ollama serves.
        needed: bytes of disk space for the file.

    Raises:
        AssetError: `out` exists, its folder cannot be made, or less than `needed` bytes are free.
    """
    if target == "ollama":
        with new_folder(out, needed=needed) as folder:
            write(folder / _MODEL_FILE)
            modelfile = f"FROM ./{_MODEL_FILE}\nPARAMETER num_ctx {length}\n"
            (folder / "Modelfile").write_text(modelfile, encoding="utf-8")
        return
    if out.exists():
        raise AssetError(f"{out} exists; choose another name, or delete it first")
    make_room(out, needed)
    write(out)


def serve_command(target: str, out: Path, length: int) -> str:
    """The command that serves what `write_for` wrote, up to `length` tokens."""
    if target == "ollama":
        return f"ollama create {shlex.quote(out.name.lower())} -f {shlex.quote(str(out / 'Modelfile'))}"
    return f"llama-server -m {shlex.quote(str(out))} -c {length}"
