"""The layers of a decoder on one device, without attention: merged weights, and the loop over them.

The residual stream is float32. The factors of matrix products have the dtype of the weights.

Shape suffixes: N tokens, E hidden size, I inner size of the MLP, H query heads, K key-value heads, D head dim,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ....errors import UnsupportedModel
from ...packed import PackedWeight
from ..decoder_runner import MAX_STEP_TOKENS
from ..family import Decoder, LinearLayer
from .ops import Ops

Mix = Callable[[int, Tensor], Tensor]
"""Attention of a layer: its index, and projected queries, keys and values [N, (H + 2K) D] -> [N, H D]."""


@dataclass(frozen=True)
class _Linear:
    """A matrix [rows, columns], float32 scales of its rows if it is int8, and its bias [rows] or None."""

    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None = None

    def __call__(self, x: Tensor, ops: Ops) -> Tensor:
        """The linear layer in the dtype of `x`."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.scale is None:
            return linear(x, self.weight.to(x.dtype), bias)
        if len(x) <= MAX_STEP_TOKENS:
            out = ops.int8_linear(x, self.weight, self.scale)
        else:
            out = (linear(x, self.weight.to(x.dtype)) * self.scale).to(x.dtype)
        return out if bias is None else out + bias

    def rounded(self) -> _Linear:
        """The same with weights in int8, by the rule of the CPU's engine."""
        codes, steps = LinearLayer(self.weight, self.bias).rounded_to_int8()
        return _Linear(codes, self.bias, steps)


def _linear(layer: LinearLayer) -> _Linear:
    if isinstance(layer.weight, PackedWeight):
        raise UnsupportedModel(f"weights in the format {layer.weight.format.name} are for the engine on CPUs")
    return _Linear(layer.weight, layer.bias)


def merged(layers: Sequence[LinearLayer], parameters: dict[int, nn.Parameter]) -> tuple[_Linear, list[LinearLayer]]:
    """Linear layers with the same input as one matrix, which the model's own parameters then share.

    Args:
        parameters: the model's, by the address of their data.

    Returns:
        The matrix, and the layers as parts of it. Nothing else holds the old memory.
    """
    linears = [_linear(layer) for layer in layers]
    weights = [each.weight for each in linears]
    ends = [weight.data_ptr() + weight.nbytes for weight in weights]
    if all(weight.data_ptr() == end for weight, end in zip(weights[1:], ends, strict=False)):  # one matrix already
        rows, columns = sum(map(len, weights)), weights[0].shape[1]
        whole = weights[0].as_strided((rows, columns), (columns, 1))
    else:
        whole = torch.cat(weights)
    parts = torch.split(whole, [len(weight) for weight in weights])
    if whole.data_ptr() != weights[0].data_ptr():
        for weight, part in zip(weights, parts, strict=True):
            parameters[weight.data_ptr()].data = part
    biases = [each.bias for each in linears]
    bias = None
    if any(each is not None for each in biases):
        pairs = zip(biases, weights, strict=True)
        bias = torch.cat([weight.new_zeros(len(weight)) if own is None else own for own, weight in pairs])
    return _Linear(whole, bias), [LinearLayer(part, own) for part, own in zip(parts, biases, strict=True)]


@dataclass(frozen=True)
class _Layer:
    """The linear layers and norms of a decoder layer, attention's own norms left out."""

    qkv: _Linear
    out: _Linear
    gate_up: _Linear
    down: _Linear
    before: Tensor | None
    after: Tensor | None
    before_mlp: Tensor | None
    after_mlp: Tensor | None


class DeviceDecoder:
    """The layers of a decoder without attention. It merges query, key and value, and gate and up.

    Args:
        decoder: its layers are replaced by those whose weights are parts of the merged ones.
        parameters: those of the model, whose data are replaced, too.

    Raises:
        UnsupportedModel: the weights are in blocks of a GGUF file.
    """

    def __init__(self, decoder: Decoder, ops: Ops, parameters: Iterable[nn.Parameter]) -> None:
        self._decoder, self._ops = decoder, ops
        by_address = {parameter.data_ptr(): parameter for parameter in parameters}
        self._layers = []
        for index, layer in enumerate(decoder.layers):
            query, key, value, out, gate, up, down = layer.linears
            qkv, (query, key, value) = merged((query, key, value), by_address)
            gate_up, (gate, up) = merged((gate, up), by_address)
            decoder.layers[index] = replace(layer, linears=(query, key, value, out, gate, up, down))
            self._layers.append(_Layer(qkv, _linear(out), gate_up, _linear(down), *layer.norms[:4]))
        self._head = _linear(decoder.head)
        self._dtype = self._head.weight.dtype

    def round_to_int8(self) -> None:
        """Hold the weights in int8 from now on, beside the model's own."""
        self._layers = [
            replace(
                layer,
                qkv=layer.qkv.rounded(),
                out=layer.out.rounded(),
                gate_up=layer.gate_up.rounded(),
                down=layer.down.rounded(),
            )
            for layer in self._layers
        ]
        self._head = self._head.rounded()

    def run(self, ids: Tensor, mix: Mix, products: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Run the tokens `ids` [N] through all layers.

        Args:
            mix: the attention.
            products: the dtype of both factors, and so of the results, of the linear layers; None is the model's.

        Returns:
            The residual stream before the last addition, float32 [N, E], and what has to be added, [N, E].
        """
        d, ops, products = self._decoder, self._ops, products or self._dtype
        x: Tensor = d.embedding(ids).to(torch.promote_types(products, torch.float32))
        delta, after = None, None
        for index, layer in enumerate(self._layers):
            normed = ops.add_norm(x, delta, after, layer.before, d.epsilon, products)
            delta = layer.out(mix(index, layer.qkv(normed, ops)), ops)
            normed = ops.add_norm(x, delta, layer.after, layer.before_mlp, d.epsilon, products)
            delta, after = layer.down(ops.gate(layer.gate_up(normed, ops), d.activation), ops), layer.after_mlp
        assert delta is not None
        return x, delta

    def logits(self, x: Tensor, delta: Tensor) -> Tensor:
        """The logits for the last positions of what `run` returned, float32 [N, V] (float64 if `x` is)."""
        d, ops, after = self._decoder, self._ops, self._layers[-1].after_mlp
        last = ops.add_norm(x, delta, after, d.final_norm, d.epsilon, delta.dtype)
        logits = self._head(last, ops).to(x.dtype)
        return d.capped(logits)
