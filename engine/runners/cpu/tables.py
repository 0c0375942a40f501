"""The tables of a decoder for the compiled step: addresses, sizes, and the tensors that own the memory."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
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

KINDS = {torch.float32: np.float32, torch.bfloat16: np.uint16, torch.int8: np.int8}
"""The numpy type by which the kernels read a dtype; uint16 holds the bits of bfloat16."""


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
    def kind(self) -> type:
        """The numpy type by which the kernels read the weights; uint8 for those in blocks, each of its own format."""
        return np.uint8 if isinstance(self.weight, PackedWeight) else KINDS[self.weight.dtype]

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
        scale, bias = (0 if x is None else x.data_ptr() for x in (self.scale, self.bias))
        weight = self.weight
        if isinstance(weight, PackedWeight):
            from .kernels import product

            row_bytes = weight.data.shape[1]
            return [weight.data.data_ptr(), scale, bias, *weight.shape, row_bytes, product(int(weight.format)), rounds]
        return [weight.data_ptr(), scale, bias, *weight.shape, 0, 0, 0]


Make = Callable[[LinearLayer], StoredLinear]


def _check_sizes(d: Decoder) -> None:
    """Refuse weights of unexpected sizes. The kernels have addresses only and would read past the end."""
    E, q, k = len(d.final_norm), d.heads * d.head_dim, d.key_heads * d.head_dim
    inner = d.layers[0].linears[4].weight.shape[0]
    for linear in (*(linear for layer in d.layers for linear in layer.linears), d.head):
        if isinstance(linear.weight, PackedWeight) and linear.weight.format not in FORMATS:
            raise UnsupportedModel(f"weights in the format {linear.weight.format.name} have no compiled form")
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
    kind: type
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
        if len({linear.kind for linear in linears}) > 1:
            raise UnsupportedModel(f"its linear layers have more than one dtype: {', '.join(sorted(formats))}")
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
            kind=head.kind,
            formats=formats,
            linears=np.array([[linear.table(rounds) for linear in linears] for linears in stored], np.int64),
            norms=np.array([*norms, [d.final_norm.data_ptr(), 0, 0, 0, 0, 0]], np.int64),
            head=np.array([head.table(rounds)], np.int64),
            half=layout.dim // 2,
            stored=stored,
            stored_head=head,
        )
