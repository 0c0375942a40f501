"""Reads the weights of a GGUF file into a transformers model: as the blocks of the file, or expanded.

The blocks stay in the mapped file. Only those of query and key projections are copied, where llama.cpp has their rows
in another order. Norms and biases become float32 parameters.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Format
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from ...errors import RopewalkError, UnsupportedModel, first_line
from ..packed import PackedEmbedding, PackedLinear, PackedWeight, pack
from .gguf_file import GgufFile, check_shapes, needed_tensors, unused_error

__all__ = ["ARCHITECTURES", "read_gguf_weights", "scales_are_finite", "why_not_packed"]

_NEIGHBOURS = {"llama"}
"""Architectures whose files have the rotated pair (n, n + d/2) of a head of q and k in neighbouring rows."""

_NORM_PLUS_ONE = {"gemma2", "gemma3"}
"""Architectures whose files store the weight of a norm plus one."""

ARCHITECTURES = {"llama", "qwen2", "qwen3", "phi3", *_NORM_PLUS_ONE}
"""Architectures that are read here: those of the compiled kernels for which transformers reads the config."""

_FLOAT16, _BFLOAT16 = 0x7C00, 0x7F80  # the exponent in 16 bits; all ones stand for infinity and NaN
_FLOATS = {
    Format.F32: ((1,), _BFLOAT16),  # the upper half of a float32 is a bfloat16
    Format.F16: ((0,), _FLOAT16),
    Format.BF16: ((0,), _BFLOAT16),
    Format.Q4_0: ((0,), _FLOAT16),
    Format.Q4_1: ((0, 1), _FLOAT16),
    Format.Q5_0: ((0,), _FLOAT16),
    Format.Q5_1: ((0, 1), _FLOAT16),
    Format.Q8_0: ((0,), _FLOAT16),
    Format.Q4_K: ((0, 1), _FLOAT16),
    Format.Q5_K: ((0, 1), _FLOAT16),
    Format.Q6_K: ((104,), _FLOAT16),
}
"""The formats that stay packed: which 16-bit words of a block are floats, and their exponent. The others are whole
numbers."""

_WORDS_AT_A_TIME = 1 << 20


class _ScaledEmbedding(PackedEmbedding):
    """An embedding whose rows are multiplied by a number."""

    factor: Tensor

    def __init__(self, packed: PackedWeight, factor: Tensor) -> None:
        super().__init__(packed)
        self.register_buffer("factor", factor, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.factor


@dataclass(frozen=True)
class _Stored:
    """A tensor of the file, for a weight of the model.

    Args:
        tensor: of the gguf library.
        order: the row of the file for each row of the weight; None for the same order.
        offset: is subtracted from its numbers.
    """

    tensor: Any
    order: Tensor | None
    offset: int

    @property
    def packed(self) -> PackedWeight:
        """Its blocks, in the order of the weight; a vector is one row."""
        rows = np.atleast_2d(self.tensor.data).view(np.uint8)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # and nothing writes to it
            data = torch.from_numpy(rows)
        return PackedWeight(data if self.order is None else data[self.order], self.tensor.tensor_type)

    def expanded(self, dtype: torch.dtype) -> nn.Parameter:
        """Its numbers."""
        weight = (self.packed.unpack() - self.offset).to(dtype) if self.offset else self.packed.expanded(dtype)
        return nn.Parameter(weight[0] if len(self.tensor.shape) == 1 else weight)


def read_gguf_weights(
    file: GgufFile, config: Any, *, dtype: torch.dtype | None = None, attn_implementation: str | None = None
) -> PreTrainedModel:
    """The transformers model of a GGUF file, on the CPU and in eval mode.

    Args:
        file: of one of the `ARCHITECTURES`.
        config: its transformers config.
        dtype: of the expanded weights; None keeps matrices in their blocks, as `PackedLinear` and `PackedEmbedding`.

    Raises:
        UnsupportedModel: tensors are missing, unused, or of another shape or of an unknown type.
    """
    try:
        return _read(file, config, dtype, attn_implementation)
    except RopewalkError:
        raise
    except Exception as error:  # of transformers or gguf, for a damaged file
        raise UnsupportedModel(f"{file.path}: its weights cannot be read ({first_line(error)})") from error


def _read(file: GgufFile, config: Any, dtype: torch.dtype | None, attn_implementation: str | None) -> PreTrainedModel:
    model = _without_weights(config, dtype or torch.float32, attn_implementation)
    tensors = _stored_weights(file, model)
    _compute_buffers(model)
    for name, stored in tensors.items():
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        packed = _packed(module, stored) if dtype is None and attribute == "weight" else None
        if packed is None:
            setattr(module, attribute, stored.expanded(dtype or torch.float32))
        else:
            pack(model, path, packed)
    _tie(model)
    return model.eval()


def why_not_packed(file: GgufFile) -> str | None:
    """Why the matrices of a file cannot stay in their blocks; None if they can."""
    formats = {tensor.tensor_type.name for tensor in file.reader.tensors if len(tensor.shape) > 1}
    others = sorted(formats - {kind.name for kind in _FLOATS})
    return f"the compiled kernels do not know the format {others[0]}" if others else None


def _without_weights(config: Any, dtype: torch.dtype, attention: str | None) -> PreTrainedModel:
    """The model of a config, on the meta device."""
    config = copy.deepcopy(config)
    chosen = {} if attention is None else {"attn_implementation": attention}
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, **chosen)
    model.generation_config = GenerationConfig.from_pretrained(config.name_or_path)
    return model


def _compute_buffers(model: PreTrainedModel) -> None:
    """Compute what a model on the meta device derives from its config, such as rotary frequencies."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model.initialize_weights()  # the weights are still on the meta device, where this changes nothing


def _stored_weights(file: GgufFile, model: PreTrainedModel) -> dict[str, _Stored]:
    """The tensors of the file by the names of the weights.

    Raises:
        UnsupportedModel: a tensor is missing, of another shape, or not used.
    """
    config = model.config
    arch = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == file.arch)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    head = _head(model)
    missing, stored, used = [], {}, set()
    for name, weight in model.state_dict().items():
        if config.tie_word_embeddings and name == f"{head}.weight":
            continue
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        tensor = file.tensors.get(gguf_name)
        if tensor is None:
            missing.append(name)
            continue
        used.add(gguf_name)
        order = _order(gguf_name, weight.shape[0], config) if file.arch in _NEIGHBOURS else None
        offset = int(file.arch in _NORM_PLUS_ONE and gguf_name.endswith("norm.weight"))
        stored[name] = _Stored(tensor, order, offset)
    expected = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    shapes = {name: tuple(map(int, reversed(entry.tensor.shape))) for name, entry in stored.items()}
    wrong = [(name, shape, expected[name]) for name, shape in shapes.items() if shape != expected[name]]
    check_shapes(file, missing, wrong)
    if unused := sorted(needed_tensors(file, config, tied=config.tie_word_embeddings) - used):
        raise unused_error(file, model, unused)
    return stored


def _order(name: str, rows: int, config: Any) -> Tensor | None:
    """For each row of a weight of q or k, its row in the file; None for other tensors."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(name.split(".")[-2])
    return None if heads is None else torch.arange(rows).view(heads, -1, 2).transpose(1, 2).flatten()


def _packed(module: nn.Module, stored: _Stored) -> PackedLinear | PackedEmbedding | None:
    """The module with the blocks of a tensor that takes the place of `module`; None if there is none."""
    if stored.tensor.tensor_type not in _FLOATS:
        return None
    if type(module) is nn.Linear:
        return PackedLinear(stored.packed, module.bias)
    if type(module) is nn.Embedding:
        return PackedEmbedding(stored.packed)
    if isinstance(module, nn.Embedding) and isinstance(factor := getattr(module, "embed_scale", None), Tensor):
        return _ScaledEmbedding(stored.packed, factor)
    return None


def _tie(model: PreTrainedModel) -> None:
    """Make the output matrix that of the embedding, if the config ties them."""
    if not model.config.tie_word_embeddings:
        return
    embedding = model.get_input_embeddings()
    if isinstance(embedding, PackedEmbedding):
        pack(model, _head(model), PackedLinear(embedding.packed))
    else:
        model.tie_weights()


def _head(model: PreTrainedModel) -> str:
    """The name of the module of the output matrix."""
    head = model.get_output_embeddings()
    name: str = next(name for name, module in model.named_modules() if module is head)
    return name


def scales_are_finite(packed: PackedWeight) -> bool:
    """True if no float in a block is NaN or infinite. Its other numbers are whole, so its weights are finite too."""
    words = packed.data.numpy().reshape(-1, gguf.GGML_QUANT_SIZES[packed.format][1]).view(np.uint16)
    (columns, exponent), step = _FLOATS[packed.format], max(1, _WORDS_AT_A_TIME // words.shape[1])
    return all(
        bool(((words[start : start + step, list(columns)] & exponent) != exponent).all())
        for start in range(0, len(words), step)
    )
