"""GGUF files under a scaler: written from a checkpoint, or from another GGUF file whose weights stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from gguf import GGUFValueType, GGUFWriter

from ...errors import AssetError, UnsupportedModel
from ...scaling.gguf_rope import GgufRope
from ..checkpoints.gguf_file import GgufFile
from ..storage import make_room, new_folder
from .gguf_write import add_rope, write_gguf, writing
from .serving_engines import modelfile

__all__ = ["place", "rewrite_gguf", "write_gguf"]

_DIVIDED = {"llama", "granite"}
"""Architectures for which llama.cpp was seen to read `rope_freqs.weight`."""

_ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_MODEL_FILE = "model.gguf"


def place(out: Path, target: str, length: int, needed: int, write: Callable[[Path], object]) -> None:
    """Call `write` with the path of the GGUF file: `out` itself for llama.cpp, in a new folder with a Modelfile for
    ollama.

    Raises:
        AssetError: something is at `out`, its folder cannot be made, or less than `needed` bytes are free there.
    """
    if target == "ollama":
        with new_folder(out, needed=needed) as work:
            write(work / _MODEL_FILE)
            (work / "Modelfile").write_text(modelfile(_MODEL_FILE, length), encoding="utf-8")
        return
    if out.exists():
        raise AssetError(f"{out} exists; choose another name, or delete it first")
    make_room(out, needed)
    write(out)


def rewrite_gguf(file: GgufFile, out: Path, rope: GgufRope, context_length: int) -> None:
    """Copy a GGUF file to `out`, with other rotary frequencies.

    Raises:
        UnsupportedModel: llama.cpp reads no divisors for this architecture, and the frequencies need them.
        AssetError: `out` cannot be written.
    """
    if rope.divisors is not None and file.arch not in _DIVIDED:
        raise UnsupportedModel(
            f"{file.path.name} is a {file.arch} model, for which llama.cpp is not known to read divisors of the "
            "frequencies; take a scaler that needs none: base, ntk, linear or yarn"
        )
    with writing(out, file.arch, endianess=file.reader.endianess) as writer:
        writer.data_alignment = file.reader.alignment
        _copy_fields(file, writer)
        writer.add_context_length(context_length)
        _write(file, writer, rope)


def _copy_fields(file: GgufFile, writer: GGUFWriter) -> None:
    """All fields but those of the rotary embedding and what the writer sets itself."""
    arch = file.arch
    rotary = ("freq_base", "dimension_count", "scale_linear")
    own = {"general.architecture", f"{arch}.context_length", *(f"{arch}.rope.{key}" for key in rotary)}
    for name, field in file.reader.fields.items():
        if name in own or name.startswith(("GGUF.", f"{arch}.rope.scaling.")):
            continue
        kind = field.types[0]
        if kind == GGUFValueType.ARRAY and not field.data:
            continue  # gguf writes no empty array
        of = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, sub_type=of)


def _write(file: GgufFile, writer: GGUFWriter, rope: GgufRope) -> None:
    """The rotary part and the tensors, byte for byte."""
    arrays = [(name, tensor.numpy(), None) for name, tensor in add_rope(writer, rope).items()]
    arrays += [(name, one.data, one.tensor_type) for name, one in file.tensors.items() if name not in _ROPE_TENSORS]
    for name, array, kind in arrays:
        writer.add_tensor_info(name, array.shape, array.dtype, array.nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, array, _ in arrays:
        writer.write_tensor_data(array)
