"""Linear layers and embeddings whose weights stay in the blocks of a GGUF file.

A block holds 32 or 256 weights of a row: small whole numbers and the scales that turn them into weights. The bytes are
used as they are in the file, which may be mapped into memory. The formats are those of ggml; the gguf library gives
their sizes and unpacks them.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    """A module with packed weights, which are neither parameters nor saved."""

    def __init__(self, packed: PackedWeight) -> None:
        super().__init__()
        self.packed = packed


class PackedLinear(_Packed):
    """x -> x W^T + bias, with W unpacked at every call."""

    def __init__(self, packed: PackedWeight, bias: Tensor | None = None) -> None:
        super().__init__(packed)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.packed.unpack().to(x.dtype), self.bias)


class PackedEmbedding(_Packed):
    """Token ids -> float32 rows of W, unpacked at every call."""

    def forward(self, ids: Tensor) -> Tensor:
        rows = PackedWeight(self.packed.data[ids.flatten()], self.packed.format).unpack()
        return rows.view(*ids.shape, -1)
