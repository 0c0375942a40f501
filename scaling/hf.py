"""Hugging Face configs: the only place that reads their RoPE. `hf_write` writes it.

`read` turns every form of `rope_parameters`, and of the older `rope_scaling` with `rope_theta`, into a
`RopeSpec` and a `Scaler`. It refuses what transformers ignores or only warns about.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError, UnsupportedModel, did_you_mean
from .configured_rope import ConfiguredRope
from .hf_write import STEP_LOG_BETA, write
from .interpolation import DynamicNTK, Linear
from .longrope import LongRoPE
from .rope import RopeSpec, Scaler
from .temperature import StepLog
from .yarn import Llama3, YaRN

__all__ = [
    "ConfiguredRope",
    "check_counts",
    "is_local",
    "merged_parameters",
    "read",
    "text_config",
    "text_content",
    "tokens",
    "write",
]

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

_MODEL_CODE_KEYS = {
    "mrope_section": "positions on several axes (multimodal RoPE)",
    "xdrope_section": "positions on several axes (multimodal RoPE)",
    "llama_4_scaling_beta": "queries scaled by their position",
    "short_mscale": "a temperature that changes with the length",
    "long_mscale": "a temperature that changes with the length",
    "alpha": "a base multiplied in the model's own code",
}
"""Keys of single families that act outside the rotary frequencies, and what they mean."""

_MOST_LAYERS = 10_000  # transformers makes a list entry or a module for each before it reads the weights
_WIDEST_HEAD = 2**16
_LONGEST = 2**48  # tokens


def read(config: Any) -> dict[str | None, ConfiguredRope]:
    """The rotary embeddings of a transformers config.

    Args:
        config: a config object, or the dict of a `config.json`. The dict needs a `model_type`, because each family
            has its own defaults for missing keys (base, rotary part of the head, layer types).

    Returns:
        One entry under None if the layers share one `rope_parameters`, else one for every layer type that
        rotates. A layer type whose entry is None has no positions and is left out.

    Raises:
        UnsupportedModel: no RoPE, or one that is not a single frequency for each pair (axial, multimodal).
        ConfigError: a key is unknown or missing, or its value is not valid.
    """
    config = text_config(config)
    name = str(getattr(config, "model_type", "") or type(config).__name__)
    _refuse_other_encodings(name, config)
    parameters = _parameters(config)
    if not parameters and getattr(config, "rope_theta", None) is None:
        raise UnsupportedModel(
            f"{name} has no rotary embedding to scale: no rope_parameters, rope_scaling or rope_theta in its config"
        )
    if not any(isinstance(value, Mapping) for value in parameters.values()):
        entry = _read_entry(name, config, _with_outside_length(config, parameters))
        return {None: dataclasses.replace(entry, layers=_layers_of(config, None))}
    return {
        layer_type: dataclasses.replace(
            _read_entry(f"{name} ({layer_type})", _layer_config(name, config, layer_type), entry),
            layers=_layers_of(config, layer_type),
        )
        for layer_type, entry in _layer_entries(name, config, parameters).items()
    }


def _layers_of(config: Any, layer_type: str | None) -> tuple[int, ...] | None:
    """The indices of the layers of a type, None for all; None if the config does not give them."""
    count, types = getattr(config, "num_hidden_layers", None), getattr(config, "layer_types", None)
    if layer_type is None:
        return tuple(range(count)) if isinstance(count, int) else None
    if not isinstance(types, list | tuple) or layer_type not in types:
        return None
    return tuple(index for index, kind in enumerate(types) if kind == layer_type)


def is_local(layer_type: str | None) -> bool:
    """True for layer types whose attention sees only a short window."""
    return layer_type is not None and any(word in layer_type for word in ("sliding", "chunked", "local"))


def merged_parameters(config: Any) -> dict[str, Any]:
    """`rope_parameters` as transformers sees them, including `rope_scaling` and keys outside of it, without nulls.

    Args:
        config: as for `read`, for a model whose layers share one rotary embedding.
    """
    config = text_config(config)
    parameters = _with_outside_length(config, _parameters(config))
    return {key: value for key, value in parameters.items() if value is not None}


def check_counts(content: Any) -> None:
    """Check the content of a config.json for more layers or experts than any model has. A damaged or malicious one
    would fill the memory before the weights are read.

    Raises:
        ConfigError: there are too many; names the key.
    """
    if isinstance(content, Mapping):
        for key, value in content.items():
            is_count = str(key).endswith(("layer", "layers", "experts"))
            if is_count and isinstance(value, int | float) and value > _MOST_LAYERS:
                raise ConfigError(f"{key}={value!r:.20} is more than {_MOST_LAYERS}")
            check_counts(value)


def _parameters(config: Any) -> Mapping[str, Any]:
    return getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}


def text_config(config: Any) -> Any:
    """transformers' config object of the text decoder.

    Args:
        config: as for `read`.
    """
    if isinstance(config, Mapping):
        config = _from_json(config)
    if not hasattr(config, "get_text_config"):
        return config
    try:
        return config.get_text_config(decoder=True)
    except ValueError as error:
        raise UnsupportedModel(f"the config has several text models; pass one of them ({error})") from None


def text_content(content: Mapping[str, Any]) -> Any:
    """The part of a config.json's content that describes the text model: its `text_config`, or all of it."""
    part = content.get("text_config")
    return part if isinstance(part, Mapping) else content


def tokens(content: Mapping[str, Any], key: str) -> int:
    """The number of tokens under a key of a config.json.

    Raises:
        ConfigError: there is none, or it is not a number of tokens.
    """
    return _length("config.json", key, content.get(key))


def _from_json(config: Mapping[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING  # a config object needs no import

    model_type = config.get("model_type")
    if model_type is None:
        raise ConfigError(
            "the config has no 'model_type', which decides the defaults of missing keys; add it or pass a config object"
        )
    check_counts(config)
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise UnsupportedModel(
            f"the installed transformers has no model_type {model_type!r}; "
            "pass the config object of the model's own code"
        )
    try:
        return CONFIG_MAPPING[model_type].from_dict(copy.deepcopy(dict(config)))  # the classes change it
    except Exception as error:  # each family raises its own class
        reason = " ".join(str(error).split())
        raise ConfigError(f"transformers does not accept this {model_type} config: {reason}") from error


def _refuse_other_encodings(name: str, config: Any) -> None:
    if getattr(config, "alibi", False):
        raise UnsupportedModel(f"{name} has alibi=True in its config, and so no rotary embedding to scale")
    encoding = getattr(config, "position_embedding_type", "rope")
    if encoding not in ("rope", "rotary"):
        raise UnsupportedModel(
            f"{name} has position_embedding_type={encoding!r} in its config, and so no rotary embedding to scale"
        )


def _layer_entries(name: str, config: Any, parameters: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The entries of the layer types that the model has and that have a rotary embedding."""
    stray = [key for key, value in parameters.items() if not isinstance(value, Mapping | None)]
    if stray:
        raise ConfigError(f"{name}: rope_parameters has {stray[0]!r} beside the layer types; move it into each of them")
    # The defaults of a class can have layer types that a small model lacks; transformers builds only declared ones.
    declared = getattr(config, "_rope_type_labels", None) or getattr(config, "layer_types", None) or parameters
    entries = {key: entry for key, entry in parameters.items() if key in declared and entry is not None}
    if not entries:
        key = next(key for key, entry in parameters.items() if entry is not None)
        raise ConfigError(f"{name}: no layer has the type {key!r} of rope_parameters.{did_you_mean(key, declared)}")
    return entries


def _layer_config(name: str, config: Any, layer_type: str) -> Any:
    """The config for the layers of one type. Gemma 4 gives each type its own head_dim."""
    if not getattr(config, "is_heterogeneous", False):
        return config
    try:
        return config.per_layer_config[layer_type]
    except ValueError as error:
        raise UnsupportedModel(f"{name}: the layers of type {layer_type!r} are not alike ({error})") from None


def _with_outside_length(config: Any, parameters: Mapping[str, Any]) -> Mapping[str, Any]:
    """`parameters` with the trained length from outside, where Phi-3 has it. transformers prefers that one, too."""
    length = getattr(config, _LENGTH, None)
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    return {**parameters, _LENGTH: length} if length and kind in _LENGTH_TYPES else parameters


def _read_entry(name: str, config: Any, parameters: Mapping[str, Any]) -> ConfiguredRope:
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
    return others, StepLog(beta=beta, length=_length(name, _LENGTH, parameters.get(_LENGTH)))


def _read_frequencies(name: str, config: Any, parameters: Mapping[str, Any]) -> ConfiguredRope:
    kind, values = _checked(name, config, parameters)
    max_length = _length(name, "max_position_embeddings", getattr(config, "max_position_embeddings", None))
    trained_length = _length(name, _LENGTH, values[_LENGTH]) if _LENGTH in values else max_length
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
        if key in _MODEL_CODE_KEYS:
            raise UnsupportedModel(f"{name}: {key!r} in rope_parameters means {_MODEL_CODE_KEYS[key]}; not supported")
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
    longest = _length(name, "max_position_embeddings", getattr(config, "max_position_embeddings", None))
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
    if isinstance(head_dim, bool) or not isinstance(head_dim, int) or head_dim > _WIDEST_HEAD:
        raise ConfigError(f"{name}: head_dim={head_dim!r:.40} must be a whole number up to {_WIDEST_HEAD}")
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


def _length(name: str, key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _LONGEST:
        raise ConfigError(f"{name}: {key}={value!r:.40} must be a whole number of tokens")
    return value
