"""Hugging Face configs: the only place that reads their RoPE, with `hf_entry`. `hf_write` writes it.

`read` turns every form of `rope_parameters`, and of the older `rope_scaling` with `rope_theta`, into a
`RopeSpec` and a `Scaler`. It refuses what transformers ignores or only warns about.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError, UnsupportedModel, did_you_mean
from .configured_rope import ConfiguredRope
from .hf_entry import checked_length, read_entry, with_outside_length
from .hf_write import write

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

_MOST_LAYERS = 10_000  # transformers makes a list entry or a module for each before it reads the weights


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
        entry = read_entry(name, config, with_outside_length(config, parameters))
        return {None: dataclasses.replace(entry, layers=_layers_of(config, None))}
    return {
        layer_type: dataclasses.replace(
            read_entry(f"{name} ({layer_type})", _layer_config(name, config, layer_type), entry),
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
    parameters = with_outside_length(config, _parameters(config))
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
    return checked_length("config.json", key, content.get(key))


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
