"""One entry of `rope_parameters`: its rope type and its keys, checked, as a geometry and a scaler."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError, UnsupportedModel, did_you_mean
from .configured_rope import ConfiguredRope
from .hf_write import STEP_LOG_BETA
from .interpolation import DynamicNTK, Linear
from .longrope import LongRoPE
from .rope import WIDEST_HEAD, RopeSpec, Scaler
from .temperature import StepLog
from .yarn import Llama3, YaRN

__all__ = ["MODEL_CODE_KEYS", "NAMED_TYPE", "SCALER_KEY", "checked_length", "read_entry", "with_outside_length"]

NAMED_TYPE, SCALER_KEY = "ropewalk", "ropewalk_scaler"
"""The rope type of a config that names a scaler (`named_scaler.py`), and the key of its spec."""

_LENGTH = "original_max_position_embeddings"
_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), (_LENGTH,)),
    "dynamic": (("factor",), ()),
    "yarn": (
        (_LENGTH,),
        ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "longrope": (("short_factor", "long_factor", _LENGTH), ("factor", "attention_factor")),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", _LENGTH), ()),
    "proportional": ((), ("factor", _LENGTH)),
}
"""The required keys of each rope type, and the optional ones."""

_LENGTH_TYPES = {"su", *(kind for kind, (required, optional) in _KEYS.items() if _LENGTH in required + optional)}
_COMMON_KEYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
_ALIASES = {"su": "longrope"}  # Phi-3's name for it before transformers had the type
_STEP_LOG_FAMILIES = ("ministral3", "mistral4")
"""Families whose code reads `llama_4_scaling_beta`."""

MODEL_CODE_KEYS = {
    "mrope_section": "positions on several axes (multimodal RoPE)",
    "xdrope_section": "positions on several axes (multimodal RoPE)",
    "llama_4_scaling_beta": "queries scaled by their position",
    "short_mscale": "a temperature that changes with the length",
    "long_mscale": "a temperature that changes with the length",
    "alpha": "a base multiplied in the model's own code",
}
"""Keys of single families that act outside the rotary frequencies, and what they mean."""

_LONGEST = 2**48  # tokens


def with_outside_length(config: Any, parameters: Mapping[str, Any]) -> Mapping[str, Any]:
    """`parameters` with the trained length from outside, where Phi-3 has it. transformers prefers that one, too."""
    length = getattr(config, _LENGTH, None)
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    return {**parameters, _LENGTH: length} if length and kind in _LENGTH_TYPES else parameters


def read_entry(name: str, config: Any, parameters: Mapping[str, Any]) -> ConfiguredRope:
    """The rotary embedding of an entry.

    Args:
        name: of the model, and of the layer type if it has several, for errors.
        config: transformers' config object of the layers, for what is outside of the entry.

    Raises:
        UnsupportedModel, ConfigError: as for `hf.read`.
    """
    if getattr(config, "model_type", None) in _STEP_LOG_FAMILIES:
        parameters, temperature = _without_step_log(name, parameters)
        return dataclasses.replace(_read_frequencies(name, config, parameters), temperature=temperature)
    return _read_frequencies(name, config, parameters)


def _without_step_log(name: str, parameters: Mapping[str, Any]) -> tuple[Mapping[str, Any], StepLog | None]:
    """`parameters` without the keys of the model's own temperature, and the temperature."""
    own = ("max_position_embeddings", STEP_LOG_BETA)  # the first repeats the key outside, and nothing reads it here
    others = {key: value for key, value in parameters.items() if key not in own}
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind not in _LENGTH_TYPES:
        others.pop(_LENGTH, None)
    if parameters.get(STEP_LOG_BETA) is None or not (beta := _number(name, parameters, STEP_LOG_BETA)):
        return others, None
    return others, StepLog(beta=beta, length=checked_length(name, _LENGTH, parameters.get(_LENGTH)))


def _read_frequencies(name: str, config: Any, parameters: Mapping[str, Any]) -> ConfiguredRope:
    kind, values = _checked(name, config, parameters)
    max_length = checked_length(name, "max_position_embeddings", getattr(config, "max_position_embeddings", None))
    trained_length = checked_length(name, _LENGTH, values[_LENGTH]) if _LENGTH in values else max_length
    head_dim = _head_dim(name, config)
    rope = _read_geometry(name, head_dim, kind, values, trained_length)
    scaler = _read_scaler(name, kind, values, max_length / trained_length)
    scaler.check(rope)
    whole = None if head_dim == rope.dim else head_dim
    if _LENGTH not in values:  # max_position_embeddings of released linear configs is either length
        return ConfiguredRope(rope=rope, scaler=scaler, max_length=max_length, head_dim=whole)
    return ConfiguredRope.of(rope, scaler, max_length, head_dim=whole)


def _checked(name: str, config: Any, parameters: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The rope type and its keys without nulls, after a check for unknown and missing keys."""
    kind = str(parameters.get("rope_type") or parameters.get("type") or "default")
    kind = _ALIASES.get(kind, kind)
    if kind == NAMED_TYPE:
        raise UnsupportedModel(
            f"{name}: the config names the scaler {getattr(config, SCALER_KEY, None)!r}; ropewalk.load reads its folder"
        )
    if kind not in _KEYS:
        raise UnsupportedModel(f"{name}: rope type {kind!r} is not supported.{did_you_mean(kind, _KEYS)}")
    # transformers reads a null `truncate` as false, but every other null as absent.
    if not isinstance(parameters.get("truncate", True), bool):
        raise ConfigError(f"{name}: truncate={parameters['truncate']!r} must be true or false")
    values = {key: value for key, value in parameters.items() if value is not None}
    for key in ("rope_theta", "partial_rotary_factor"):  # older configs have these outside
        if key not in values and getattr(config, key, None) is not None:
            values[key] = getattr(config, key)
    values = _without_repetition(values) if kind == "longrope" else values
    values = _without_attn_factor(name, config, values) if kind == "yarn" else values
    required, optional = _KEYS[kind]
    known = {*_COMMON_KEYS, *required, *optional}
    for key in sorted(values.keys() - known):
        if key in MODEL_CODE_KEYS:
            raise UnsupportedModel(f"{name}: {key!r} in rope_parameters means {MODEL_CODE_KEYS[key]}; not supported")
        raise ConfigError(f"{name}: unknown key {key!r} for rope type {kind!r}.{did_you_mean(key, known)}")
    for key in ("rope_theta", *required):
        if key not in values:
            raise ConfigError(f"{name}: rope type {kind!r} needs {key!r} in rope_parameters")
    return kind, values


def _without_repetition(values: dict[str, Any]) -> dict[str, Any]:
    """LongRoPE without vLLM's and SGLang's keys for `attention_factor`, if they have the same value."""
    repeated = ("short_mscale", "long_mscale")
    if any(values.get(key) != values.get("attention_factor") for key in repeated):
        return values
    return {key: value for key, value in values.items() if key not in repeated}


def _without_attn_factor(name: str, config: Any, values: dict[str, Any]) -> dict[str, Any]:
    """YaRN without the factor on m that vLLM and SGLang read and transformers ignores, if it is 1."""
    others = {key: value for key, value in values.items() if key != "attn_factor"}
    if "attn_factor" not in values or (given := _number(name, values, "attn_factor")) == 1:
        return others
    longest = checked_length(name, "max_position_embeddings", getattr(config, "max_position_embeddings", None))
    factor = _number(name, others, "factor", longest / _number(name, others, _LENGTH, longest))
    m = _read_yarn(name, others, factor).temperature()
    raise ConfigError(
        f"{name}: engines disagree about attn_factor={given:g} in rope_parameters. vLLM and SGLang multiply the factor "
        f"on cos and sin by it (m = {m * given:.4g}); transformers ignores it (m = {m:.4g}). Edit config.json: replace "
        f"it by attention_factor: {m * given:.6g} for the first m, or remove it for the second"
    )


def _head_dim(name: str, config: Any) -> int:
    try:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    # RuntimeError where heads differ from layer to layer.
    except (AttributeError, RuntimeError, TypeError, ArithmeticError) as error:
        raise UnsupportedModel(f"{name}: the head dimension is not in the config ({error})") from None
    if isinstance(head_dim, bool) or not isinstance(head_dim, int) or head_dim > WIDEST_HEAD:
        raise ConfigError(f"{name}: head_dim={head_dim!r:.40} must be a whole number up to {WIDEST_HEAD}")
    return head_dim


def _read_geometry(name: str, head_dim: int, kind: str, values: dict[str, Any], trained_length: int) -> RopeSpec:
    base = _number(name, values, "rope_theta")
    share = _number(name, values, "partial_rotary_factor", 1.0)
    if not 0 < share <= 1:
        raise ConfigError(f"{name}: partial_rotary_factor {share:g} must be above 0 and at most 1")
    if kind == "proportional":
        pairs = int(share * head_dim // 2)
        rotating_pairs = pairs if pairs < head_dim // 2 else None
        return RopeSpec(dim=head_dim, base=base, trained_length=trained_length, rotating_pairs=rotating_pairs)
    dim = int(head_dim * share)
    if dim < 2 or dim % 2:
        raise UnsupportedModel(
            f"{name}: head_dim {head_dim} with partial_rotary_factor {share:g} rotates {dim} dimensions; "
            "only an even number of at least 2 can be paired"
        )
    return RopeSpec(dim=dim, base=base, trained_length=trained_length)


def _read_scaler(name: str, kind: str, values: Mapping[str, Any], stretch: float) -> Scaler:
    """The scaler. `stretch` is max_position_embeddings over the trained length, the factor if the config has none."""
    factor = _number(name, values, "factor", 1.0 if kind == "proportional" else stretch)
    if kind == "default" or (kind == "proportional" and factor == 1):
        return Scaler()
    if kind == "dynamic":
        return DynamicNTK(factor=factor)
    if kind == "llama3":
        low, high = (_number(name, values, key) for key in ("low_freq_factor", "high_freq_factor"))
        return Llama3(factor=factor, low_freq_factor=low, high_freq_factor=high)
    if kind == "longrope":
        return LongRoPE(
            factor=factor,
            short=_numbers(name, values, "short_factor"),
            long=_numbers(name, values, "long_factor"),
            attention_factor=_number_or_none(name, values, "attention_factor"),
        )
    if kind == "yarn":
        return _read_yarn(name, values, factor)
    return Linear(factor=factor)


def _read_yarn(name: str, values: Mapping[str, Any], factor: float) -> YaRN:
    optional = ("attention_factor", "mscale", "mscale_all_dim")
    attention_factor, mscale, mscale_all_dim = (_number_or_none(name, values, key) for key in optional)
    # transformers' order: attention_factor, then both mscales, then the rule; zero counts as absent. Latent
    # attention reads mscale_all_dim in any case.
    mscale_all_dim = mscale_all_dim or None
    if attention_factor is not None or not (mscale and mscale_all_dim):
        mscale = None
    return YaRN(
        factor=factor,
        beta_fast=_number(name, values, "beta_fast", 32.0),
        beta_slow=_number(name, values, "beta_slow", 1.0),
        truncate=values.get("truncate", True),
        attention_factor=attention_factor,
        mscale=mscale,
        mscale_all_dim=mscale_all_dim,
    )


def _number_or_none(name: str, values: Mapping[str, Any], key: str) -> float | None:
    return _number(name, values, key) if key in values else None


def _number(name: str, values: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = values.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < math.inf:
        raise ConfigError(f"{name}: {key}={value!r} must be a number")
    try:
        return float(value)
    except OverflowError:
        raise ConfigError(f"{name}: {key} has {len(str(value))} digits; float64 cannot hold it") from None


def _numbers(name: str, values: Mapping[str, Any], key: str) -> tuple[float, ...]:
    items = values[key]
    if not isinstance(items, list | tuple):
        raise ConfigError(f"{name}: {key}={items!r} must be a list of numbers, one for each rotary pair")
    return tuple(_number(name, {key: item}, key) for item in items)


def checked_length(name: str, key: str, value: Any) -> int:
    """A number of tokens in a config.

    Raises:
        ConfigError: it is not one.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _LONGEST:
        raise ConfigError(f"{name}: {key}={value!r:.40} must be a whole number of tokens")
    return value
