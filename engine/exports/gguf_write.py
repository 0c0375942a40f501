"""GGUF files for llama.cpp: written from a Llama checkpoint, or from a GGUF file whose weights stay as they are."""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gguf import (
    MODEL_ARCH,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFValueType,
    GGUFWriter,
    LlamaFileType,
    get_tensor_name_map,
)
from gguf.constants import GGML_QUANT_SIZES, GGML_QUANT_VERSION
from gguf.quants import quantize
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from ...errors import AssetError, ConfigError, Setting, UnsupportedModel, did_you_mean
from ...scaling import hf as hf_config
from ...scaling.gguf_rope import GgufRope
from ..checkpoints.checkpoint import read_config, read_tokenizer, read_weights
from ..checkpoints.gguf_conversion import file_behind
from ..checkpoints.gguf_file import GgufFile
from ..hf_model import stop_ids
from ..storage import cache_dir, fill_once
from .gguf_write_tokenizer import add_vocabulary

__all__ = ["GGUF_DTYPES", "cached_gguf", "rewrite_gguf", "write_gguf"]

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase | None]

GGUF_DTYPES = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
"""The number formats of matrices."""

_REVISION = 2
"""Part of the cache key. Raise it when the written files change."""


_ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")

_READ_DIVISORS = {"llama", "granite"}
"""Architectures for which llama.cpp was seen to read `rope_freqs.weight`."""


def write_gguf(
    model: Loaded | str | Path,
    path: str | Path,
    dtype: str = "bf16",
    *,
    rope: GgufRope | None = None,
    context_length: int | None = None,
) -> Path:
    """Write a Llama checkpoint with its tokenizer to one GGUF file, and return `path`.

    Matrices are written as `dtype`, vectors (the norms) in float32. The rows of the query and key projections
    [heads * d, hidden] are reordered: llama.cpp rotates neighbours (2n, 2n + 1) of a head, transformers rotates
    (n, n + d/2).

    Args:
        model: the folder of a Hugging Face checkpoint, or a transformers model that `check_unmodified` accepts, with
            its tokenizer.
        path: the file. After an error no file is there.
        dtype: "f32", "bf16", "f16" or "q8_0" (8 bits, and a scale for 32 weights; a matrix whose rows are no multiple
            of 32 is written as f16).
        rope: the rotary frequencies; None takes those of the config.
        context_length: the context length that the file states, in tokens; None takes that of the config.

    Raises:
        ConfigError: unknown dtype, or frequencies that one file cannot hold.
        UnsupportedModel: the model is no LlamaForCausalLM, or has something that the format cannot express.
        AssetError: there is no such checkpoint, or the file cannot be written.
    """
    if dtype not in GGUF_DTYPES:
        suggestion = did_you_mean(dtype, GGUF_DTYPES)
        raise ConfigError("unknown GGUF ", Setting("dtype", repr(dtype), "given"), f".{suggestion}")
    hf, tokenizer, name = _from_folder(Path(model)) if isinstance(model, str | Path) else _from_memory(*model)
    if rope is None:
        configured = hf_config.read(hf.config)[None]
        rope = GgufRope.of(configured.rope, configured.scaler)
    path = Path(path)
    with _writer(path, MODEL_ARCH_NAMES[MODEL_ARCH.LLAMA]) as writer:
        _add_config(writer, hf.config, name, context_length)
        rope_freqs = _add_rope(writer, rope)
        add_vocabulary(writer, tokenizer, hf.config.vocab_size, name, stop_ids(hf, tokenizer))
        kind, file_type = GGUF_DTYPES[dtype]
        writer.add_file_type(file_type)
        writer.add_quantization_version(GGML_QUANT_VERSION)
        _write_tensors(writer, _tensors(hf, name) | rope_freqs, kind, hf.config)
    return path


def rewrite_gguf(file: GgufFile, path: Path, rope: GgufRope, context_length: int) -> None:
    """Copy a GGUF file to `path` with other rotary frequencies. The tensors are copied byte for byte.

    Args:
        context_length: the context length that the new file states, in tokens.

    Raises:
        UnsupportedModel: the frequencies need a divisor for each pair, and llama.cpp reads none for this architecture.
        AssetError: `path` cannot be written.
    """
    if rope.divisors is not None and file.arch not in _READ_DIVISORS:
        raise UnsupportedModel(
            f"{file.path.name} is a {file.arch} model, and llama.cpp is not known to read divisors of the frequencies "
            "for it; take a scaler that needs none: base, ntk, linear or yarn"
        )
    with _writer(path, file.arch, endianess=file.reader.endianess) as writer:
        writer.data_alignment = file.reader.alignment
        _copy_fields(file, writer)
        writer.add_context_length(context_length)
        arrays = [(name, divisors.numpy(), None) for name, divisors in _add_rope(writer, rope).items()]
        for name, tensor in file.tensors.items():
            if name not in _ROPE_TENSORS:
                arrays.append((name, tensor.data, tensor.tensor_type))
        for name, array, kind in arrays:
            writer.add_tensor_info(name, array.shape, array.dtype, array.nbytes, kind)
        _write_header(writer)
        for _, array, _ in arrays:
            writer.write_tensor_data(array)


def cached_gguf(folder: Path, dtype: str) -> Path:
    """The checkpoint in `folder` as a GGUF file, written on the first call and kept in the cache.

    Raises:
        ConfigError, UnsupportedModel, AssetError: as `write_gguf`.
    """
    from rich.console import Console
    from rich.markup import escape

    files = sorted(file for file in folder.iterdir() if file.is_file())
    states = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = hashlib.sha256(f"{_REVISION} {folder.resolve()} {states}".encode()).hexdigest()[:12]
    target = cache_dir() / f"{dtype}-{folder.name}-{key}"
    file = f"{folder.name}-{dtype}.gguf"
    if not target.exists():
        what = f"{folder.name} as {dtype} GGUF"
        console = Console(file=sys.stderr)
        shown = console.status(escape(f"writing {what}")) if console.is_terminal else contextlib.nullcontext()
        packed = file_behind(folder)  # its weights may have 4 bits
        stored = sum(size for _, size, _ in states) + (0 if packed is None else 4 * packed.stat().st_size)
        needed = 2 * stored  # float32 of a checkpoint in 16 bits
        with shown, fill_once(target, needed=needed, what=what) as work:
            if work is not None:
                write_gguf(folder, work / file, dtype)
    return target / file


@contextlib.contextmanager
def _writer(path: Path, arch: str, **options: Any) -> Iterator[GGUFWriter]:
    """gguf's writer of a file that appears at `path` when the block ends. After an error no file is there.

    Raises:
        AssetError: the file cannot be written.
    """
    unfinished = path.with_name(f"{path.name}.partial")
    try:
        writer = GGUFWriter(unfinished, arch, **options)
        try:
            yield writer
        finally:
            writer.close()
        unfinished.replace(path)
    except OSError as error:
        raise AssetError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        with contextlib.suppress(OSError):  # for example its folder is a file, which the error above says
            unfinished.unlink(missing_ok=True)


def _from_memory(hf: Any, tokenizer: Any) -> tuple[Any, Any, str]:
    """The transformers model, the tokenizer and a name."""
    name = hf.name_or_path or type(hf).__name__
    _check_config(hf.config, name)
    if not isinstance(hf, LlamaForCausalLM):
        raise UnsupportedModel(f"{name} is a {type(hf).__name__}; only LlamaForCausalLM is written to GGUF")
    if tokenizer is None:
        raise ConfigError(f"{name}: a GGUF file holds a tokenizer too; give tokenizer=")
    return hf, tokenizer, Path(name).name


def _from_folder(folder: Path) -> tuple[Any, Any, str]:
    """The same of a checkpoint's folder."""
    if not (folder / "config.json").is_file():
        raise AssetError(f"{folder} has no config.json, so it is no Hugging Face checkpoint")
    config = read_config(str(folder))
    _check_config(config, str(folder))
    return read_weights(str(folder), config, dtype="auto"), read_tokenizer(folder), folder.resolve().name


def _check_config(config: Any, name: str) -> None:
    architecture = (config.architectures or [config.model_type])[0]
    if architecture != "LlamaForCausalLM":
        raise UnsupportedModel(f"{name} is a {architecture}; only LlamaForCausalLM is written to GGUF")
    for setting, plain in (("attention_bias", False), ("mlp_bias", False), ("hidden_act", "silu")):
        if (value := getattr(config, setting, plain)) != plain:
            raise UnsupportedModel(f"{name} has {setting} {value}; only {plain} is written to GGUF")
    if config.get_text_config() is not config or getattr(config, "quantization_config", None):
        raise UnsupportedModel(f"{name} is quantized; only plain weights are written to GGUF")


def _add_config(writer: GGUFWriter, config: Any, name: str, context_length: int | None) -> None:
    """Add the hyperparameters, without the rotary ones."""
    writer.add_name(name)
    writer.add_context_length(context_length or config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _add_rope(writer: GGUFWriter, rope: GgufRope) -> dict[str, Tensor]:
    """Add the keys of the rotary frequencies, and return the tensors that belong to them."""
    writer.add_rope_dimension_count(rope.dim)
    writer.add_rope_freq_base(rope.base)
    for key, value in rope.scaling.items():
        kind = {str: GGUFValueType.STRING, int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32}[type(value)]
        writer.add_key_value(f"{writer.arch}.rope.scaling.{key}", value, kind)
    return {} if rope.divisors is None else {"rope_freqs.weight": rope.divisors}


def _copy_fields(file: GgufFile, writer: GGUFWriter) -> None:
    """Copy all fields, without those of the rotary embedding and those that the writer sets itself."""
    arch = file.arch
    rotary = ("freq_base", "dimension_count", "scale_linear")
    replaced = {"general.architecture", f"{arch}.context_length", *(f"{arch}.rope.{key}" for key in rotary)}
    for name, field in file.reader.fields.items():
        if name in replaced or name.startswith(("GGUF.", f"{arch}.rope.scaling.")):
            continue
        kind = field.types[0]
        if kind == GGUFValueType.ARRAY and not field.data:
            continue  # gguf cannot write an empty array
        items = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, sub_type=items)


def _tensors(hf: Any, name: str) -> dict[str, Tensor]:
    """The weights by their names in GGUF, without an output matrix that is the embedding."""
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, hf.config.num_hidden_layers)
    tensors = {}
    for hf_name, tensor in hf.state_dict().items():
        if hf_name == "lm_head.weight" and hf.config.tie_word_embeddings:
            continue
        gguf_name = names.get_name(hf_name, try_suffixes=(".weight",))
        if gguf_name is None or not tensor.is_floating_point():
            raise UnsupportedModel(f"{name}: a GGUF file has no tensor for {hf_name!r} ({tensor.dtype})")
        tensors[gguf_name] = tensor
    return tensors


def _write_tensors(writer: GGUFWriter, tensors: dict[str, Tensor], wanted: GGMLQuantizationType, config: Any) -> None:
    """Write all tensors, and convert one at a time."""
    kinds = {name: _kind(tensor, wanted) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        block, block_bytes = GGML_QUANT_SIZES[kinds[name]]
        nbytes = tensor.numel() // block * block_bytes
        writer.add_tensor_info(name, tuple(tensor.shape), np.dtype(np.float32), nbytes, raw_dtype=kinds[name])
    _write_header(writer)
    heads = {"attn_q.weight": config.num_attention_heads, "attn_k.weight": config.num_key_value_heads}
    for name, tensor in tensors.items():
        if rotated_heads := heads.get(name.split(".", 2)[-1]):
            tensor = _neighbours(tensor, rotated_heads)
        writer.write_tensor_data(quantize(tensor.detach().float().cpu().numpy(), kinds[name]))


def _write_header(writer: GGUFWriter) -> None:
    """Write what precedes the tensors' data; the tensors have to be announced before."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def _kind(tensor: Tensor, wanted: GGMLQuantizationType) -> GGMLQuantizationType:
    if tensor.ndim == 1:
        return GGMLQuantizationType.F32
    return wanted if tensor.shape[-1] % GGML_QUANT_SIZES[wanted][0] == 0 else GGMLQuantizationType.F16


def _neighbours(weight: Tensor, heads: int) -> Tensor:
    """The rows of `weight` [heads * d, hidden], reordered so that rows n and n + d/2 of a head are neighbours."""
    halves = weight.reshape(heads, 2, -1, weight.shape[-1])
    return halves.transpose(1, 2).reshape(weight.shape)
