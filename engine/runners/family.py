"""The model families that the compiled kernels run, and how to read the weights of their decoders.

All of them are norm, attention, add, norm, gated MLP, add. A family names its norms, and says how queries and keys are
normed and whether weights are fused. Everything else is read from the modules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...errors import UnsupportedModel
from ..cache import common_window
from ..packed import PackedLinear, PackedWeight

_PRE = ("input_layernorm", None, "post_attention_layernorm", None)
_POST = (None, "post_attention_layernorm", None, "post_feedforward_layernorm")
_BOTH = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)


@dataclass(frozen=True, kw_only=True)
class Family:
    """The differences of a family's layers from Llama's.

    Args:
        norms: names of a layer's norms: before attention, after it, before the MLP, after it.
        query_key_norm: the norm of queries and keys: over each head ("heads"), over all heads at once ("whole"), or
            none.
        fused: query, key and value are one matrix, and gate and up are another one.
        norm_adds_one: norms multiply by 1 + weight.
    """

    norms: tuple[str | None, str | None, str | None, str | None] = _PRE
    query_key_norm: Literal["heads", "whole"] | None = None
    fused: bool = False
    norm_adds_one: bool = False


FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "ministral": Family(),
    "ministral3": Family(),
    "qwen2": Family(),
    "qwen3": Family(query_key_norm="heads"),
    "smollm3": Family(),
    "phi3": Family(fused=True),
    "olmo2": Family(norms=_POST, query_key_norm="whole"),
    "gemma": Family(norm_adds_one=True),
    "gemma2": Family(norms=_BOTH, norm_adds_one=True),
    "gemma3_text": Family(norms=_BOTH, query_key_norm="heads", norm_adds_one=True),
}
"""Families by their `model_type`."""

_ACTIVATIONS: dict[str, Literal["silu", "gelu_tanh"]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
}


@dataclass(frozen=True)
class LinearLayer:
    """The model's own weights [rows, columns] and bias [rows] or None."""

    weight: Tensor | PackedWeight
    bias: Tensor | None

    def rows(self, start: int, stop: int) -> LinearLayer:
        """Some of its rows."""
        return LinearLayer(self.weight[start:stop], None if self.bias is None else self.bias[start:stop])

    def rounded_to_int8(self) -> tuple[Tensor, Tensor]:
        """Its weights in int8, and the float32 step of each row, which is 1/127 of its largest weight."""
        weight = self.weight.unpack() if isinstance(self.weight, PackedWeight) else self.weight.float()
        steps = weight.abs().amax(1).clamp(min=1e-30) / 127
        return (weight / steps[:, None]).round_().to(torch.int8), steps


@dataclass(frozen=True, kw_only=True)
class DecoderLayer:
    """The weights of one decoder layer.

    Args:
        linears: query, key, value, out, gate, up, down.
        norms: before and after attention, before and after the MLP, of queries, of keys; float32 or None.
        window: the number of keys that a query sees, or None for all.
        scale: the factor on the scores.
        softcap: c in c tanh(score / c), or None.
    """

    linears: tuple[LinearLayer, ...]
    norms: tuple[Tensor | None, ...]
    window: int | None
    scale: float
    softcap: float | None


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """The weights and sizes of a whole decoder."""

    layers: list[DecoderLayer]
    embedding: nn.Module
    final_norm: Tensor
    head: LinearLayer
    epsilon: float
    heads: int
    key_heads: int
    head_dim: int
    activation: Literal["silu", "gelu_tanh"]
    norms_whole: bool
    softcap: float | None

    @property
    def linears(self) -> list[LinearLayer]:
        """Those of all layers, and the head."""
        return [*(linear for layer in self.layers for linear in layer.linears), self.head]

    def capped(self, logits: Tensor) -> Tensor:
        """cap * tanh(logits / cap), the soft-cap of Gemma's logits; the same tensor without a cap."""
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


def decoder(hf: PreTrainedModel) -> Decoder:
    """Read the weights of a transformers model by its family's description. Only the norms are copied.

    Raises:
        UnsupportedModel: no description of its family exists, or the model differs from the description.
    """
    config: Any = hf.config.get_text_config()
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UnsupportedModel(f"the family {config.model_type!r} is not described in engine/runners/family.py")
    name = getattr(config, "hidden_activation", None) or config.hidden_act
    activation = _ACTIVATIONS.get(name)
    if activation is None:
        raise UnsupportedModel(f"the activation {name!r} has no compiled form")
    body = hf.get_decoder()
    try:
        layers = [_layer(family, layer, config) for layer in body.layers]
    except AttributeError as error:
        raise UnsupportedModel(
            f"{type(hf).__name__} does not have the modules of the family {config.model_type!r}: {error}"
        ) from None
    head = hf.get_output_embeddings()
    heads, dim = config.num_attention_heads, body.layers[0].self_attn.head_dim
    return Decoder(
        layers=layers,
        embedding=hf.get_input_embeddings(),
        final_norm=_norm(family, body.norm, config),
        head=_linear(head),
        epsilon=config.rms_norm_eps,
        heads=heads,
        key_heads=config.num_key_value_heads,
        head_dim=dim,
        activation=activation,
        norms_whole=family.query_key_norm == "whole",
        softcap=getattr(config, "final_logit_softcapping", None),
    )


def _layer(family: Family, layer: Any, config: Any) -> DecoderLayer:
    attention, mlp = layer.self_attn, layer.mlp
    if family.fused:
        qkv, gate_up = _linear(attention.qkv_proj), _linear(mlp.gate_up_proj)
        q = config.num_attention_heads * attention.head_dim
        k = config.num_key_value_heads * attention.head_dim
        inner = gate_up.weight.shape[0] // 2
        query, key, value = qkv.rows(0, q), qkv.rows(q, q + k), qkv.rows(q + k, q + 2 * k)
        gate, up = gate_up.rows(0, inner), gate_up.rows(inner, 2 * inner)
    else:
        query, key, value = _linear(attention.q_proj), _linear(attention.k_proj), _linear(attention.v_proj)
        gate, up = _linear(mlp.gate_proj), _linear(mlp.up_proj)
    norms = [None if name is None else _norm(family, getattr(layer, name), config) for name in family.norms]
    if family.query_key_norm:
        norms += [_norm(family, attention.q_norm, config), _norm(family, attention.k_norm, config)]
    else:
        norms += [None, None]
    return DecoderLayer(
        linears=(query, key, value, _linear(attention.o_proj), gate, up, _linear(mlp.down_proj)),
        norms=tuple(norms),
        window=_window(attention, config),
        scale=attention.scaling,
        softcap=getattr(attention, "attn_logit_softcapping", None),
    )


def _linear(module: nn.Linear | PackedLinear) -> LinearLayer:
    if type(module) is PackedLinear:
        weight: Tensor | PackedWeight = module.packed
    elif type(module) is nn.Linear:
        weight = module.weight.detach()
    else:  # an adapter or a quantized layer computes something else
        raise UnsupportedModel(f"{type(module).__name__} is not a plain linear layer")
    return LinearLayer(weight, None if module.bias is None else module.bias.detach())


def _window(attention: Any, config: Any) -> int | None:
    """The sliding window of a layer. The layer and the config, which gives the mask, must have the same."""
    window: int | None = getattr(attention, "sliding_window", common_window(config))
    if window is not None and window != config.sliding_window:
        raise UnsupportedModel(
            f"a layer has the sliding window {window} and the config has {config.sliding_window}; set both to the same"
        )
    return window


def _norm(family: Family, module: nn.Module, config: Any) -> Tensor:
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if epsilon != config.rms_norm_eps:
        raise UnsupportedModel(
            f"a {type(module).__name__} has the epsilon {epsilon} and the config has {config.rms_norm_eps}; set both "
            "to the same"
        )
    weight: Tensor = module.weight.detach().float()  # type: ignore[operator]
    return (1 + weight if family.norm_adds_one else weight).contiguous()


def supported(config: Any) -> bool:
    """True if `FAMILIES` has the family of a config."""
    return config.get_text_config().model_type in FAMILIES
