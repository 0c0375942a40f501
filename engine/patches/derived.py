"""Numbers outside of the rotary modules that a model computes from `rope_parameters` when it is built.

An example: latent attention multiplies its softmax scale by (0.1 mscale_all_dim ln factor + 1)^2. No list of families
is needed: the model is built on the meta device, without weights, under two configs, and their modules are compared.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ...errors import UnsupportedModel
from ...scaling.hf import ConfiguredRope
from ...scaling.hf_write import write
from ...scaling.longrope import fix_length
from ...scaling.rope import Scaler
from ..rotary_site import RotarySite
from .attention_hook import language_model

Parameters = Mapping[str | None, Mapping[str, Any]]
"""`rope_parameters` by layer type, or under None if all layers share them."""

Numbers = dict[tuple[str, str], float]
"""Numbers by the name of a module and of its attribute."""

_PLAIN = {"rope_type": "default"}
_LENGTHS = {"factor": 4.0, "original_max_position_embeddings": 16}
_LISTS = {"short_factor": [1.0], "long_factor": [1.0]}
_DISTINCT: tuple[dict[str, Any], ...] = (
    {"rope_type": "yarn", "attention_factor": 1.1, "mscale": 0.7, "mscale_all_dim": 1.3, **_LENGTHS},
    {"rope_type": "longrope", "attention_factor": 1.1, "short_mscale": 1.2, "long_mscale": 1.3, **_LENGTHS, **_LISTS},
)
"""Rope types that set more than frequencies, with every key that a model may use elsewhere."""

_SCALING_KEYS = {"type", "beta_fast", "beta_slow", "truncate", "low_freq_factor", "high_freq_factor"}.union(*_DISTINCT)


class DerivedNumbers:
    """Sets the derived numbers of a model to those of a scaler, and restores them.

    The new numbers are those of a model with the config that `export` writes for the scaler. A scaler that does not set
    frequencies does not change them.

    Args:
        sites: the rotary sites whose frequencies the scaler replaces.

    Raises:
        UnsupportedModel: the model cannot be built from its config, or its numbers differ from those of its config; or
            it has such numbers, and the scaler sets other frequencies in some layers than in others.
    """

    def __init__(self, model: PreTrainedModel, sites: list[RotarySite], scaler: Scaler) -> None:
        model = language_model(model)
        self._wanted: list[tuple[nn.Module, str, float]] = []
        self._originals: list[float] = []
        method = scaler.member("frequencies")
        if method is None or not derives_numbers(type(model), model.config):
            return
        if method.differs_by_layer:
            raise UnsupportedModel(
                f"{type(model).__name__} computes more than its frequencies from rope_parameters, for all layers at "
                f"once, and {scaler} differs by layer; take one frequency method for all layers"
            )
        parameters = {site.layer_type: parameters_under(site.configured, scaler) for site in sites}
        before = derived_numbers(type(model), model.config)
        for (name, attribute), value in derived_numbers(type(model), model.config, parameters).items():
            if before[name, attribute] == value:
                continue
            module = model.get_submodule(name)
            if getattr(module, attribute) != before[name, attribute]:
                raise UnsupportedModel(
                    f"{type(model).__name__}: {name}.{attribute} is {getattr(module, attribute)}, and its config gives "
                    f"{before[name, attribute]}; undo what changed it before you patch the model"
                )
            self._wanted.append((module, attribute, value))

    def __bool__(self) -> bool:
        return bool(self._wanted)

    def apply(self) -> None:
        """Set the numbers of the scaler, if they are not set."""
        if not self._originals:
            self._originals = [getattr(module, attribute) for module, attribute, _ in self._wanted]
            for module, attribute, value in self._wanted:
                setattr(module, attribute, value)

    def restore(self) -> None:
        """Restore the numbers from before."""
        for (module, attribute, _), value in zip(self._wanted, self._originals, strict=False):
            setattr(module, attribute, value)
        self._originals = []


def parameters_under(configured: ConfiguredRope, scaler: Scaler) -> dict[str, Any]:
    """The `rope_parameters`, in the form of transformers, for the frequencies of `scaler` without a wavelength grid."""
    host = configured.effective(scaler).member("frequencies") or Scaler()
    rope = configured.rope
    static = fix_length(host, rope, rope.trained_length)
    return write(rope, static, head_dim=configured.head_dim, temperature=configured.temperature)


def derives_numbers(kind: type[PreTrainedModel], config: Any) -> bool:
    """True if a model of this class computes numbers from `rope_parameters` outside of its rotary modules.

    Raises:
        UnsupportedModel: such a model cannot be built from its config.
    """
    return _derives(_CacheKey(kind, config.to_json_string(use_diff=False), config))


@dataclass(frozen=True)
class _CacheKey:
    """A model class and a config, as the key of a cache."""

    kind: type[PreTrainedModel]
    content: str
    config: Any = field(compare=False)


@functools.lru_cache(maxsize=128)
def _derives(key: _CacheKey) -> bool:
    configured = getattr(key.config.get_text_config(), "rope_parameters", None) or {}
    layer_types: list[str | None] = [name for name, value in configured.items() if isinstance(value, Mapping)] or [None]
    plain, *distinct = (
        derived_numbers(key.kind, key.config, dict.fromkeys(layer_types, parameters))
        for parameters in (_PLAIN, *_DISTINCT)
    )
    return any(numbers != plain for numbers in distinct)


def derived_numbers(kind: type[PreTrainedModel], config: Any, changed: Parameters | None = None) -> Numbers:
    """The numbers in the modules of a model, without its rotary modules.

    Args:
        changed: scalings to use instead of those of the config.

    Raises:
        UnsupportedModel: the model cannot be built from its config.
    """
    config = copy.deepcopy(config)
    text = config.get_text_config()
    if changed:
        text.rope_parameters = _replaced(getattr(text, "rope_parameters", None) or {}, changed)
    try:
        with torch.device("meta"):
            model = kind(config)
    except Exception as error:  # the model's own code
        raise UnsupportedModel(
            f"{kind.__name__} cannot be built from its config alone ({type(error).__name__}: {error}), so it is not "
            "known what, besides its frequencies, depends on rope_parameters"
        ) from error
    return {
        (name, attribute): value
        for name, module in model.named_modules()
        if not any(key.endswith("inv_freq") for key in module._buffers)
        for attribute, value in vars(module).items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _replaced(parameters: Mapping[str, Any], changed: Parameters) -> dict[str, Any]:
    """`rope_parameters` with another scaling. Keys that do not belong to a scaling stay."""
    if None in changed:
        return {**{key: value for key, value in parameters.items() if key not in _SCALING_KEYS}, **changed[None]}
    return {
        key: _replaced(value, {None: changed[key]}) if key in changed else value for key, value in parameters.items()
    }
