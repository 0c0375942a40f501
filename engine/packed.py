"""Linear layers and embeddings whose weights stay in the blocks of a GGUF file.

A block holds 32 or 256 weights of a row: small whole numbers and the scales that turn them into weights. The bytes are
used as they are in the file, which may be mapped into memory. The formats are those of ggml; the gguf library gives
their sizes and unpacks them.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TypeVar

import gguf
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

_BYTES_AT_A_TIME = 1 << 22  # the gguf library makes several float32 copies of what it unpacks


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

    def rows(self, start: int, stop: int) -> PackedWeight:
        """The rows [start, stop)."""
        return PackedWeight(self.data[start:stop], self.format)

    def unpack(self) -> Tensor:
        """The weights, float32 [rows, columns]."""
        weights = torch.empty(self.shape)
        step = max(1, _BYTES_AT_A_TIME // self.data.shape[1])
        for start in range(0, len(self.data), step):
            part = self.data[start : start + step].numpy()
            weights[start : start + step] = torch.from_numpy(gguf.dequantize(part, self.format))
        return weights


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
        return linear(x, self.packed.unpack().to(x.dtype), self.bias)


class PackedEmbedding(_Packed):
    """Token ids -> float32 rows of W, unpacked at every call."""

    def __init__(self, packed: PackedWeight) -> None:
        super().__init__(packed)
        self.num_embeddings, self.embedding_dim = packed.shape

    def forward(self, ids: Tensor) -> Tensor:
        rows = PackedWeight(self.packed.data[ids.flatten()], self.packed.format).unpack()
        return rows.view(*ids.shape, -1)


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
