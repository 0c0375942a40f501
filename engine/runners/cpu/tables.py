"""The tables of a decoder for the compiled step: addresses, sizes, and the tensors that own the memory."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ....errors import UnsupportedModel
from ...hf_model import dtype_name
from ...packed import PackedWeight
from ..family import Decoder, LinearLayer
from ..rotation_table import LayerGroup
from .kernels import FORMATS

_CODES = {torch.float32: 0, torch.float16: 1, torch.int8: 24, torch.bfloat16: 30}
"""The ggml types of weights that are not in blocks."""

_KINDS = {torch.float32: np.float32, torch.bfloat16: np.uint16, torch.int8: np.int8}
CACHE_DTYPES = frozenset(_KINDS)
"""The dtypes of keys and values that the kernels read."""


@cache
def cache_kernels(dtype: torch.dtype, rotates: bool) -> np.ndarray[Any, Any]:
    """The bytes of a number, and the addresses of attention kernels, as `step` takes them. Each is compiled when used.

    Args:
        dtype: of keys and values.
        rotates: whether a part rotates its keys.
    """
    from .kernels import part

    addresses = [part(_KINDS[dtype], rotating).address for rotating in (False, True)[: 1 + rotates]]
    return np.array([dtype.itemsize, *addresses, 0], np.int64)


@dataclass(frozen=True)
class StoredLinear:
    """A linear layer for the kernels: weights in their own dtype or format, float32 scales and bias [rows] or None."""

    weight: Tensor | PackedWeight
    scale: Tensor | None
    bias: Tensor | None

    @classmethod
    def of(cls, layer: LinearLayer) -> StoredLinear:
        """The model's own weights, not copied."""
        return cls(layer.weight.contiguous(), None, None if layer.bias is None else layer.bias.float())

    @classmethod
    def rounded_to_int8(cls, layer: LinearLayer) -> StoredLinear:
        """Weights rounded to int8."""
        codes, scale = layer.rounded_to_int8()
        return cls(codes, scale, StoredLinear.of(layer).bias)

    def rows(self, start: int, stop: int) -> StoredLinear:
        """The rows [start, stop)."""
        scale, bias = (None if x is None else x[start:stop] for x in (self.scale, self.bias))
        return StoredLinear(self.weight[start:stop], scale, bias)

    @property
    def format(self) -> str:
        """`bfloat16`, or `Q4_K`."""
        weight = self.weight
        return weight.format.name if isinstance(weight, PackedWeight) else dtype_name(weight.dtype)

    def table(self, rounds: int = 1) -> list[int]:
        """The addresses and sizes that `project_any` takes.

        Args:
            rounds: how often vectors are rounded to 16 bits for weights in blocks.
        """
        from .kernels import product

        weight, row_bytes = self.weight, 0
        scale, bias = (0 if x is None else x.data_ptr() for x in (self.scale, self.bias))
        if isinstance(weight, PackedWeight):
            data, code, row_bytes = weight.data, int(weight.format), weight.data.shape[1]
        else:
            data, code, rounds = weight, _CODES[weight.dtype], 0
        return [data.data_ptr(), scale, bias, *weight.shape, row_bytes, product(code), rounds]


Make = Callable[[LinearLayer], StoredLinear]


def _check_sizes(d: Decoder) -> None:
    """Refuse weights of unexpected sizes. The kernels have addresses only and would read past the end."""
    E, q, k = len(d.final_norm), d.heads * d.head_dim, d.key_heads * d.head_dim
    inner = d.layers[0].linears[4].weight.shape[0]
    for weight in (linear.weight for linear in d.linears):
        if isinstance(weight, PackedWeight) and weight.format not in FORMATS:
            raise UnsupportedModel(f"weights in the format {weight.format.name} have no compiled form")
        if not isinstance(weight, PackedWeight) and weight.dtype not in _CODES:
            raise UnsupportedModel(f"weights in {dtype_name(weight.dtype)} have no compiled form")
    uneven = [size for size in (E, q, inner, d.head_dim) if size % 16]
    if uneven:
        raise UnsupportedModel(f"compiled kernels need sizes that are a multiple of 16, and {uneven[0]} is not")
    shapes = [(q, E), (k, E), (k, E), (E, q), (inner, E), (inner, E), (E, inner)]
    head_norms = (q, k) if d.norms_whole else (d.head_dim, d.head_dim)
    for index, layer in enumerate(d.layers):
        linears = [tuple(linear.weight.shape) for linear in layer.linears] == shapes
        norms = all(
            norm is None or len(norm) == n for norm, n in zip(layer.norms, (E, E, E, E, *head_norms), strict=True)
        )
        if not (linears and norms):
            raise UnsupportedModel(f"the weights of layer {index} do not have the sizes in its family's description")


@dataclass(frozen=True)
class Tables:
    """The arguments of the compiled step that describe the decoder, and the tensors behind its addresses."""

    shape: np.ndarray[Any, Any]
    numbers: np.ndarray[Any, Any]
    formats: list[str]
    linears: np.ndarray[Any, Any]
    norms: np.ndarray[Any, Any]
    head: np.ndarray[Any, Any]
    half: int
    stored: list[tuple[StoredLinear, ...]] = field(repr=False)
    stored_head: StoredLinear = field(repr=False)

    @classmethod
    def of(cls, d: Decoder, groups: list[LayerGroup], make: Make | None = None, rounds: int = 1) -> Tables:
        """The tables of a decoder.

        Args:
            make: stores a linear layer; None keeps the model's own weights.
            rounds: how often vectors are rounded to 16 bits for weights in blocks: 1, or 2 for float32 arithmetic.

        Raises:
            UnsupportedModel: the decoder breaks an assumption of a kernel.
        """
        make = make or StoredLinear.of
        stored = [tuple(map(make, layer.linears)) for layer in d.layers]
        head = make(d.head)
        _check_sizes(d)
        linears = [*(linear for layer in stored for linear in layer), head]
        sizes: Counter[str] = Counter()
        for linear in linears:
            sizes[linear.format] += math.prod(linear.weight.shape)
        formats = [name for name, _ in sizes.most_common()]
        if len({(layer.scale, layer.softcap) for layer in d.layers}) > 1:
            raise UnsupportedModel("its layers scale their scores differently")
        layout = next((group.layout for group in groups if group.layout is not None), None)
        if layout is None:
            raise UnsupportedModel("no layer rotates its queries and keys")
        norms = [[0 if norm is None else norm.data_ptr() for norm in layer.norms] for layer in d.layers]
        shape = [d.heads, d.key_heads, d.head_dim, {"silu": 0, "gelu_tanh": 1}[d.activation], d.norms_whole]
        return cls(
            shape=np.array([*shape, layout.start, layout.dim, layout.interleaved], np.int64),
            numbers=np.array([d.epsilon, d.layers[0].softcap or 0], np.float32),
            formats=formats,
            linears=np.array([[linear.table(rounds) for linear in linears] for linears in stored], np.int64),
            norms=np.array([*norms, [d.final_norm.data_ptr(), 0, 0, 0, 0, 0]], np.int64),
            head=np.array([head.table(rounds)], np.int64),
            half=layout.dim // 2,
            stored=stored,
            stored_head=head,
        )
