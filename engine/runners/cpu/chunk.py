"""Runs a chunk of one sequence in torch: the layers of a decoder of `family.py`.

Shape suffixes: N tokens of the chunk, E hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, rms_norm, silu

from ...attention.kernel import AttentionScore
from ...packed import PackedWeight
from ..chunk_attention import Attend
from ..family import Decoder
from .tables import StoredLinear, Tables

_HEAD_ROWS = 8192  # rows of the output layer that are widened at a time


class DecoderLayers:
    """The layers without attention. One buffer takes each weight, in the dtype of the products, when it is used."""

    def __init__(self, decoder: Decoder, tables: Tables) -> None:
        self._decoder = decoder
        self._tables = tables
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def run(self, ids: Sequence[int], attend: Attend, products: torch.dtype) -> Tensor:
        """The hidden states after the last layer, float32 [N, E].

        Args:
            products: the dtype of both factors, and so of the results, of the linear layers.
        """
        count, d = len(ids), self._decoder
        x_NE: Tensor = d.embedding(torch.tensor(ids)).float()
        for index, layer in enumerate(d.layers):
            query, key, value, out, gate, up, down = self._tables.stored[index]
            before, after, before_mlp, after_mlp, *head_norms = layer.norms
            normed = _rms(x_NE, before, d.epsilon).to(products)
            q, k, v = (self._apply(projection, normed) for projection in (query, key, value))
            if not d.norms_whole:
                q, k, v = (x.view(count, -1, d.head_dim) for x in (q, k, v))
            q, k = (_rms(x, norm, d.epsilon) for x, norm in zip((q, k), head_norms, strict=True))
            q, k, v = (x.reshape(count, -1, d.head_dim).transpose(0, 1)[None] for x in (q, k, v))
            mixed = attend(index, q, k, v, AttentionScore(scale=layer.scale, softcap=layer.softcap))
            mixed = mixed[0].transpose(0, 1).reshape(count, -1).to(products)
            x_NE = x_NE + _rms(self._apply(out, mixed), after, d.epsilon)
            normed = _rms(x_NE, before_mlp, d.epsilon).to(products)
            gated = self._apply(gate, normed)
            gated = silu(gated, inplace=True) if d.activation == "silu" else gelu(gated, approximate="tanh")
            x_NE = x_NE + _rms(self._apply(down, gated.mul_(self._apply(up, normed))), after_mlp, d.epsilon)
        return x_NE

    def logits(self, x_NE: Tensor) -> Tensor:
        """The logits for hidden states, [N, V]. Their products are float32."""
        last, head = _rms(x_NE, self._decoder.final_norm, self._decoder.epsilon), self._tables.stored_head
        logits = torch.empty(len(last), head.weight.shape[0])
        for r in range(0, logits.shape[1], _HEAD_ROWS):
            logits[:, r : r + _HEAD_ROWS] = self._apply(head.rows(r, r + _HEAD_ROWS), last)
        return self._decoder.capped(logits)

    def _apply(self, stored: StoredLinear, x: Tensor) -> Tensor:
        """The linear layer in the dtype of `x`."""
        weight = stored.weight
        if isinstance(weight, PackedWeight):
            weight = weight.unpack(self._room(weight.shape, x.dtype))
        elif weight.dtype != x.dtype:
            weight = self._room(weight.shape, x.dtype).copy_(weight)
        bias = None if stored.bias is None else stored.bias.to(x.dtype)
        if stored.scale is None:
            return linear(x, weight, bias)
        out = linear(x, weight).mul_(stored.scale)
        return out if bias is None else out.add_(bias)

    def _room(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The buffer as a tensor."""
        size = math.prod(shape) * dtype.itemsize
        if self._buffer.numel() < size:
            with torch.inference_mode(False):  # calls outside of inference mode write there too
                self._buffer = torch.empty(size, dtype=torch.uint8)
        return self._buffer[:size].view(dtype).view(shape)


def _rms(x: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
    """The RMS norm in float32; `x` itself without weights."""
    if weight is None:
        return x
    return rms_norm(x.float(), weight.shape, weight, epsilon)
