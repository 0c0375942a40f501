"""A decoder as the compiled step takes it: addresses, sizes, and the tensors that own the memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ....errors import UnsupportedModel
from ...attention.rotation import Layout
from ...patches.probe import LayerRope
from ...rotary_site import RotarySite
from .family import Decoder, LinearLayer
from .rotation_table import LayerGroup

KINDS = {torch.float32: np.float32, torch.bfloat16: np.uint16, torch.int8: np.int8}
"""How the kernels read a dtype."""


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16`."""
    return str(dtype).removeprefix("torch.")


def groups_of(d: Decoder, ropes: dict[int, LayerRope]) -> tuple[list[LayerGroup], list[int]]:
    """Layers with the same rotation, and the group of every layer."""
    groups: dict[tuple[RotarySite | None, Layout | None, int | None], int] = {}
    found = []
    for index, layer in enumerate(d.layers):
        rope = ropes[index]
        if rope.is_local != (layer.window is not None):
            raise UnsupportedModel(f"layer {index} is local in a way that is not a sliding window")
        key = (rope.site, rope.layout, layer.window)
        found.append(groups.setdefault(key, len(groups)))
    layouts = {layout for _, layout, _ in groups if layout is not None}
    if len(layouts) > 1:
        raise UnsupportedModel("its layers lay out their rotary pairs differently")
    return [LayerGroup(*key) for key in groups], found


@dataclass(frozen=True)
class StoredLinear:
    """A linear as the kernels read it: weights in their own dtype, float32 scales and bias [rows] or None."""

    weight: Tensor
    scale: Tensor | None
    bias: Tensor | None

    @classmethod
    def of(cls, one: LinearLayer) -> StoredLinear:
        """The model's own weights, not copied."""
        return cls(one.weight.contiguous(), None, None if one.bias is None else one.bias.float())

    @classmethod
    def rounded_to_int8(cls, one: LinearLayer) -> StoredLinear:
        """Every row in whole steps of a 127th of its largest weight."""
        weight = one.weight.float()
        scale = weight.abs().amax(1).clamp(min=1e-30) / 127
        return cls((weight / scale[:, None]).round_().to(torch.int8), scale, StoredLinear.of(one).bias)

    def rows(self, start: int, stop: int) -> StoredLinear:
        """Some of its rows."""
        scale, bias = (None if x is None else x[start:stop] for x in (self.scale, self.bias))
        return StoredLinear(self.weight[start:stop], scale, bias)

    @property
    def table(self) -> list[int]:
        """As `project_rows` takes it."""
        scale, bias = (0 if x is None else x.data_ptr() for x in (self.scale, self.bias))
        return [self.weight.data_ptr(), scale, bias, *self.weight.shape]


Make = Callable[[LinearLayer], StoredLinear]


def _check_sizes(d: Decoder) -> None:
    """Refuse what the kernels, which see addresses only, would read past the end of."""
    E, q, k = len(d.final_norm), d.heads * d.head_dim, d.key_heads * d.head_dim
    inner = len(d.layers[0].linears[4].weight)
    uneven = [size for size in (E, q, inner, d.head_dim) if size % 16]
    if uneven:
        raise UnsupportedModel(f"compiled kernels need sizes that are a multiple of 16, which {uneven[0]} is not")
    shapes = [(q, E), (k, E), (k, E), (E, q), (inner, E), (inner, E), (E, inner)]
    head_norms = (q, k) if d.norms_whole else (d.head_dim, d.head_dim)
    for index, layer in enumerate(d.layers):
        linears = [tuple(one.weight.shape) for one in layer.linears] == shapes
        norms = all(
            norm is None or len(norm) == n for norm, n in zip(layer.norms, (E, E, E, E, *head_norms), strict=True)
        )
        if not (linears and norms):
            raise UnsupportedModel(
                f"the weights of layer {index} are not of the sizes that its family's description says"
            )
    dtypes = {one.weight.dtype for one in (*(one for layer in d.layers for one in layer.linears), d.head)}
    if len(dtypes) > 1:
        raise UnsupportedModel(
            f"its linear layers are of more than one dtype ({', '.join(sorted(map(dtype_name, dtypes)))})"
        )


@dataclass(frozen=True)
class Tables:
    """The decoder as the compiled step takes it, and the tensors that its addresses point into."""

    shape: np.ndarray[Any, Any]
    numbers: np.ndarray[Any, Any]
    kind: type
    linears: np.ndarray[Any, Any]
    norms: np.ndarray[Any, Any]
    groups: np.ndarray[Any, Any]
    head: np.ndarray[Any, Any]
    half: int
    stored: list[tuple[StoredLinear, ...]] = field(repr=False)
    stored_head: StoredLinear = field(repr=False)

    @classmethod
    def of(cls, d: Decoder, groups: list[LayerGroup], group_of: list[int], make: Make | None = None) -> Tables:
        """Raises UnsupportedModel where a kernel's assumption does not hold."""
        make = make or StoredLinear.of
        stored = [tuple(map(make, layer.linears)) for layer in d.layers]
        head = make(d.head)
        _check_sizes(d)
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
            kind=KINDS[head.weight.dtype],
            linears=np.array([[one.table for one in linears] for linears in stored], np.int64),
            norms=np.array([*norms, [d.final_norm.data_ptr(), 0, 0, 0, 0, 0]], np.int64),
            groups=np.array(group_of, np.int64),
            head=np.array([head.table], np.int64),
            half=layout.dim // 2,
            stored=stored,
            stored_head=head,
        )
