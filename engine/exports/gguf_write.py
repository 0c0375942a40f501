"""Checkpoints of the Llama family written as GGUF files, which llama.cpp reads."""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

from ...errors import AssetError, ConfigError, UnsupportedModel, did_you_mean
from ...scaling import hf as hf_config
from ...scaling.gguf_rope import GgufRope
from ..checkpoints.checkpoint import read_config, read_tokenizer, read_weights
from ..hf_model import stop_ids
from ..rotary_site import primary_rotary
from ..storage import cache_dir, fill_once
from .gguf_write_tokenizer import add_vocabulary
from .plain import check_plain

if TYPE_CHECKING:
    from ..model import Model

__all__ = ["GGUF_DTYPES", "add_rope", "cached_gguf", "write_gguf", "writing"]

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase | None]

GGUF_DTYPES = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
"""What matrices can be written as."""

_REVISION = 2
"""Raised when the files change, so that those of an older version are not used."""


def write_gguf(
    model: Model | Loaded | str | Path,
    path: str | Path,
    dtype: str = "bf16",
    *,
    rope: GgufRope | None = None,
    context_length: int | None = None,
) -> Path:
    """Write a Llama checkpoint with its tokenizer to one GGUF file, and return `path`.

    Matrices are written as `dtype`, vectors (the norms) in float32. The rows of the query and key projections
    [heads * d, hidden] change places: llama.cpp rotates neighbours (2n, 2n + 1) of a head where transformers rotates
    (n, n + d/2).

    Args:
        model: what `load` gave, under its scaler; a transformers model that `check_plain` takes, and its tokenizer; or
            the folder of a Hugging Face checkpoint.
        path: the file; it is there whole or not at all.
        dtype: "f32", "bf16", "f16" or "q8_0" (8 bits and a scale for 32 weights; a matrix whose rows are no multiple
            of 32 is written as f16).
        rope: the rotary frequencies; None is the model's own.
        context_length: tokens that the file promises to carry; None is what the config does.

    Raises:
        ConfigError: unknown dtype, or frequencies that one file cannot hold.
        UnsupportedModel: not a LlamaForCausalLM, or with something that the format cannot say.
        AssetError: no such checkpoint, or the file cannot be written.
    """
    if dtype not in GGUF_DTYPES:
        raise ConfigError(f"unknown GGUF dtype {dtype!r}.{did_you_mean(dtype, GGUF_DTYPES)}")
    hf, tokenizer, name = _parts(model)
    if rope is None:
        rope = _rope_of(hf.config if isinstance(model, str | Path | tuple) else model)
    path = Path(path)
    with writing(path, MODEL_ARCH_NAMES[MODEL_ARCH.LLAMA]) as writer:
        _add_config(writer, hf.config, name, context_length)
        rope_freqs = add_rope(writer, rope)
        add_vocabulary(writer, tokenizer, hf.config.vocab_size, name, stop_ids(hf, tokenizer))
        kind, file_type = GGUF_DTYPES[dtype]
        writer.add_file_type(file_type)
        writer.add_quantization_version(GGML_QUANT_VERSION)
        _write(writer, _tensors(hf, name) | rope_freqs, kind, hf.config)
    return path


@contextlib.contextmanager
def writing(path: Path, arch: str, **options: Any) -> Iterator[GGUFWriter]:
    """gguf's writer of a file that is at `path`, whole, when the block ends without an error; else nothing is there.

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
        with contextlib.suppress(OSError):  # such as that its folder is none, which the error above says
            unfinished.unlink(missing_ok=True)


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
        needed = 2 * sum(size for _, size, _ in states)  # float32 of a checkpoint in 16 bits
        with shown, fill_once(target, needed=needed, what=what) as work:
            if work is not None:
                write_gguf(folder, work / file, dtype)
    return target / file


def _parts(model: Model | Loaded | str | Path) -> tuple[Any, Any, str]:
    """The transformers model, the tokenizer and a name."""
    if not isinstance(model, str | Path):
        hf, tokenizer = model if isinstance(model, tuple) else (model.hf, model.tokenizer)
        name = hf.name_or_path or type(hf).__name__
        _check(hf.config, name)
        if not isinstance(hf, LlamaForCausalLM):
            raise UnsupportedModel(f"{name} is a {type(hf).__name__}; only LlamaForCausalLM is written to GGUF")
        if not isinstance(model, tuple):
            check_plain(model)
        if tokenizer is None:
            raise ConfigError(f"{name}: a GGUF file holds a tokenizer too; give tokenizer=")
        return hf, tokenizer, Path(name).name
    folder = Path(model)
    if not (folder / "config.json").is_file():
        raise AssetError(f"{folder}: no Hugging Face checkpoint there: a folder with a config.json is needed")
    config = read_config(str(folder))
    _check(config, str(folder))
    hf = read_weights(str(folder), config, dtype="auto")
    return hf, read_tokenizer(folder), folder.resolve().name


def _check(config: Any, name: str) -> None:
    architecture = (config.architectures or [config.model_type])[0]
    if architecture != "LlamaForCausalLM":
        raise UnsupportedModel(f"{name} is a {architecture}; only LlamaForCausalLM is written to GGUF")
    for setting, plain in (("attention_bias", False), ("mlp_bias", False), ("hidden_act", "silu")):
        if (value := getattr(config, setting, plain)) != plain:
            raise UnsupportedModel(f"{name} has {setting} {value}; only {plain} is written to GGUF")
    if config.get_text_config() is not config or getattr(config, "quantization_config", None):
        raise UnsupportedModel(f"{name} is quantized; only plain weights are written to GGUF")


def _rope_of(model: Any) -> GgufRope:
    """Of a model under its scaler, or of a config."""
    if not hasattr(model, "sites"):
        configured = hf_config.read(model)[None]
        return GgufRope.of(configured.rope, configured.scaler)
    return GgufRope.of(model.spec, primary_rotary(model.sites).configured.effective(model.rope))


def _add_config(writer: GGUFWriter, config: Any, name: str, context_length: int | None) -> None:
    """The hyperparameters but for the rotary ones."""
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


def add_rope(writer: GGUFWriter, rope: GgufRope) -> dict[str, Tensor]:
    """The keys of the rotary frequencies; returns the tensors that belong to them."""
    writer.add_rope_dimension_count(rope.dim)
    writer.add_rope_freq_base(rope.base)
    for key, value in rope.scaling.items():
        kind = {str: GGUFValueType.STRING, int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32}[type(value)]
        writer.add_key_value(f"{writer.arch}.rope.scaling.{key}", value, kind)
    return {} if rope.divisors is None else {"rope_freqs.weight": rope.divisors}


def _tensors(hf: Any, name: str) -> dict[str, Tensor]:
    """The weights by their names in GGUF; an output matrix that is the embedding is left out."""
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, hf.config.num_hidden_layers)
    found = {}
    for own, tensor in hf.state_dict().items():
        if own == "lm_head.weight" and hf.config.tie_word_embeddings:
            continue
        written = names.get_name(own, try_suffixes=(".weight",))
        if written is None or not tensor.is_floating_point():
            raise UnsupportedModel(f"{name}: its tensor {own!r} ({tensor.dtype}) has no place in a GGUF file")
        found[written] = tensor
    return found


def _write(writer: GGUFWriter, tensors: dict[str, Tensor], wanted: GGMLQuantizationType, config: Any) -> None:
    """Write all tensors, converting one at a time."""
    kinds = {name: _kind(tensor, wanted) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        block, block_bytes = GGML_QUANT_SIZES[kinds[name]]
        nbytes = tensor.numel() // block * block_bytes
        writer.add_tensor_info(name, tuple(tensor.shape), np.dtype(np.float32), nbytes, raw_dtype=kinds[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    heads = {"attn_q.weight": config.num_attention_heads, "attn_k.weight": config.num_key_value_heads}
    for name, tensor in tensors.items():
        if rotating := heads.get(name.split(".", 2)[-1]):
            tensor = _neighbours(tensor, rotating)
        writer.write_tensor_data(quantize(tensor.detach().float().cpu().numpy(), kinds[name]))


def _kind(tensor: Tensor, wanted: GGMLQuantizationType) -> GGMLQuantizationType:
    if tensor.ndim == 1:
        return GGMLQuantizationType.F32
    return wanted if tensor.shape[-1] % GGML_QUANT_SIZES[wanted][0] == 0 else GGMLQuantizationType.F16


def _neighbours(weight: Tensor, heads: int) -> Tensor:
    """Rows [heads * d, hidden] in the order in which (n, n + d/2) of a head come to lie side by side."""
    halves = weight.reshape(heads, 2, -1, weight.shape[-1])
    return halves.transpose(1, 2).reshape(weight.shape)
