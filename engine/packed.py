"""Linear layers and embeddings whose weights stay in the blocks of a GGUF file.

A block holds 32 or 256 weights of a row: small whole numbers and the scales that turn them into weights. The bytes are
used as they are in the file, which may be mapped into memory. The formats are those of ggml.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TypeVar

import gguf
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .runners.cpu.kernels import BLOCK_FORMATS
from .runners.cpu.threads import share_threads

_BYTES_AT_A_TIME = 1 << 22  # the gguf library makes several float32 copies of what it unpacks
_WEIGHTS_AT_A_TIME = 1 << 22  # 16 MB; the output matrix of a large vocabulary would take gigabytes
_PLAIN = {
    gguf.GGMLQuantizationType.F32: torch.float32,
    gguf.GGMLQuantizationType.F16: torch.float16,
    gguf.GGMLQuantizationType.BF16: torch.bfloat16,
}
_KINDS = {torch.float32: np.float32, torch.bfloat16: np.uint16}


@dataclass(frozen=True)
class PackedWeight:
    """A matrix in the blocks of a GGUF file.

    Args:
        data: the bytes, uint8 [rows, bytes of a row].
        format: the ggml type, such as Q4_K.
    """

    data: Tensor
    format: gguf.GGMLQuantizationType

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        block, size = gguf.GGML_QUANT_SIZES[self.format]
        return self.data.shape[0], self.data.shape[1] // size * block

    def __getitem__(self, rows: slice | Tensor) -> PackedWeight:
        """Some of its rows."""
        return PackedWeight(self.data[rows], self.format)

    def contiguous(self) -> PackedWeight:
        """The same rows one after the other in memory."""
        return PackedWeight(self.data.contiguous(), self.format)

    def unpack(self, out: Tensor | None = None) -> Tensor:
        """The weights, float32 [rows, columns], written to `out` if it is given.

        Args:
            out: contiguous; float32, or bfloat16, to which weights are rounded (to nearest, ties to even).
        """
        out = torch.empty(self.shape) if out is None else out
        if self.format in _PLAIN:
            return out.copy_(self.data.view(_PLAIN[self.format]))
        if self.format not in BLOCK_FORMATS:
            return self._unpack_by_gguf(out)
        from .runners.cpu.kernels import unpack

        data, kind = self.data.contiguous(), _KINDS[out.dtype]
        rows, row_bytes = data.shape
        unpack(int(self.format), kind, data.data_ptr(), rows, row_bytes, self.shape[1], out.data_ptr(), share_threads())
        return out

    def expanded(self, dtype: torch.dtype) -> Tensor:
        """The weights as numbers of any dtype, [rows, columns], by way of a few float32 rows at a time."""
        out = torch.empty(self.shape, dtype=dtype)
        step = max(1, _WEIGHTS_AT_A_TIME // self.shape[1])
        for start in range(0, len(out), step):
            out[start : start + step] = self[start : start + step].unpack()
        return out

    def _unpack_by_gguf(self, out: Tensor) -> Tensor:
        step = max(1, _BYTES_AT_A_TIME // self.data.shape[1])
        for start in range(0, len(self.data), step):
            part = self.data[start : start + step].numpy()
            out[start : start + step] = torch.from_numpy(gguf.dequantize(part, self.format))
        return out


class _Packed(nn.Module):
    """A module with packed weights, which are neither parameters nor saved.

    Attributes:
        replaced: the plain module, without weights, in whose place it is; in a tuple, so that it is no part of it.
    """

    replaced: tuple[nn.Linear | nn.Embedding]

    def __init__(self, packed: PackedWeight) -> None:
        super().__init__()
        self.packed = packed


class PackedLinear(_Packed):
    """x -> x W^T + bias, with W unpacked at every call."""

    def __init__(self, packed: PackedWeight, bias: Tensor | None = None) -> None:
        super().__init__(packed)
        self.out_features, self.in_features = packed.shape
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        step = max(1, _WEIGHTS_AT_A_TIME // self.in_features)
        out = x.new_empty(*x.shape[:-1], self.out_features)
        for start in range(0, self.out_features, step):
            rows = slice(start, start + step)
            bias = None if self.bias is None else self.bias[rows]
            out[..., rows] = linear(x, self.packed[rows].unpack().to(x.dtype), bias)
        return out


class PackedEmbedding(_Packed):
    """Token ids -> float32 rows of W, unpacked at every call."""

    def __init__(self, packed: PackedWeight) -> None:
        super().__init__(packed)
        self.num_embeddings, self.embedding_dim = packed.shape

    def forward(self, ids: Tensor) -> Tensor:
        return self.packed[ids.flatten()].unpack().view(*ids.shape, -1)


ModelT = TypeVar("ModelT", bound=nn.Module)


def pack(model: nn.Module, name: str, packed: _Packed) -> None:
    """Put a packed module in the place of the plain one with this name."""
    plain = model.get_submodule(name)
    assert isinstance(plain, nn.Linear | nn.Embedding)
    packed.replaced = (plain,)
    model.set_submodule(name, packed)


def packed_weights(model: nn.Module) -> dict[str, PackedWeight]:
    """The packed weights of a model by their names, as parameters have them: a shared one has its first name."""
    names: dict[int, str] = {}
    packed = {f"{name}.weight": module.packed for name, module in model.named_modules() if isinstance(module, _Packed)}
    return {name: weight for name, weight in packed.items() if names.setdefault(id(weight), name) == name}


def unpacked(model: ModelT) -> ModelT:
    """A copy of a model in which float32 parameters take the place of packed weights. A model without any is returned
    as it is."""
    if not (packed := packed_weights(model)):
        return model
    plain = copy.deepcopy(model, {id(weight): weight for weight in packed.values()})
    weights = {id(weight): nn.Parameter(weight.unpack()) for weight in packed.values()}
    for name, module in list(plain.named_modules()):
        if isinstance(module, _Packed):
            [replaced] = module.replaced
            replaced.weight = weights[id(module.packed)]
            if (bias := getattr(module, "bias", None)) is not None:
                replaced.register_parameter("bias", bias)
            plain.set_submodule(name, replaced)
    return plain
