"""Numbers outside of the rotary modules that a model computes from `rope_parameters` when it is built.

Latent attention, for one, multiplies its softmax scale by (0.1 mscale_all_dim ln factor + 1)^2. No family is known by
name: the model is built anew on the meta device, without weights, under two configs, and its modules are compared.
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

__all__ = ["DerivedNumbers", "Numbers", "Parameters", "derived_numbers", "derives_numbers", "parameters_under"]

Parameters = Mapping[str | None, Mapping[str, Any]]
"""`rope_parameters` by layer type, or under None where the layers share one."""

Numbers = dict[tuple[str, str], float]
"""By the name of a module, and of its attribute."""

_PLAIN = {"rope_type": "default"}
_LENGTHS = {"factor": 4.0, "original_max_position_embeddings": 16}
_LISTS = {"short_factor": [1.0], "long_factor": [1.0]}
_DISTINCT: tuple[dict[str, Any], ...] = (
    {"rope_type": "yarn", "attention_factor": 1.1, "mscale": 0.7, "mscale_all_dim": 1.3, **_LENGTHS},
    {"rope_type": "longrope", "attention_factor": 1.1, "short_mscale": 1.2, "long_mscale": 1.3, **_LENGTHS, **_LISTS},
)
"""Rope types that say more than frequencies, with every key that could become a number elsewhere."""

_SCALING_KEYS = {"type", "beta_fast", "beta_slow", "truncate", "low_freq_factor", "high_freq_factor"}.union(*_DISTINCT)


class DerivedNumbers:
    """The numbers of a model that change with a scaler: put in place, and taken back.

    They are those of a model with the config that `export` writes for the scaler. A scaler that does not set
    frequencies leaves them as they are.

    Args:
        configured: the rotary embeddings that the scaler replaces, by layer type.

    Raises:
        UnsupportedModel: the model cannot be built from its config, or does not hold what its config says.
    """

    def __init__(self, model: PreTrainedModel, configured: Mapping[str | None, ConfiguredRope], scaler: Scaler) -> None:
        self._wanted: list[tuple[nn.Module, str, float]] = []
        self._originals: list[float] = []
        if scaler.member("frequencies") is None or not derives_numbers(type(model), model.config):
            return
        parameters = {kind: parameters_under(rope, scaler) for kind, rope in configured.items()}
        own = derived_numbers(type(model), model.config)
        for (name, attribute), value in derived_numbers(type(model), model.config, parameters).items():
            if own[name, attribute] == value:
                continue
            module = model.get_submodule(name)
            if getattr(module, attribute) != own[name, attribute]:
                raise UnsupportedModel(
                    f"{type(model).__name__}: {name}.{attribute} is {getattr(module, attribute)}, and its config gives "
                    f"{own[name, attribute]}; undo what changed it before you patch the model"
                )
            self._wanted.append((module, attribute, value))

    def __bool__(self) -> bool:
        return bool(self._wanted)

    def apply(self) -> None:
        """Put them in place, if they are not."""
        if not self._originals:
            self._originals = [getattr(module, attribute) for module, attribute, _ in self._wanted]
            for module, attribute, value in self._wanted:
                setattr(module, attribute, value)

    def restore(self) -> None:
        """Put back what was there before."""
        for (module, attribute, _), value in zip(self._wanted, self._originals, strict=False):
            setattr(module, attribute, value)
        self._originals = []


def parameters_under(configured: ConfiguredRope, scaler: Scaler) -> dict[str, Any]:
    """The `rope_parameters` in transformers' own form for the frequencies of `scaler`, without a wavelength grid."""
    host = configured.effective(scaler).member("frequencies") or Scaler()
    rope = configured.rope
    return write(rope, fix_length(host, rope, rope.trained_length), head_dim=configured.head_dim)


def derives_numbers(kind: type[PreTrainedModel], config: Any) -> bool:
    """True if a model of this class computes numbers from `rope_parameters` outside of its rotary modules.

    Raises:
        UnsupportedModel: such a model cannot be built from its config.
    """
    return _derives(_CacheKey(kind, config.to_json_string(use_diff=False), config))


@dataclass(frozen=True)
class _CacheKey:
    """A model class and a config, as a key of a cache."""

    kind: type[PreTrainedModel]
    content: str
    config: Any = field(compare=False)


@functools.lru_cache(maxsize=128)
def _derives(asked: _CacheKey) -> bool:
    own = getattr(asked.config.get_text_config(), "rope_parameters", None) or {}
    layer_types: list[str | None] = [key for key, value in own.items() if isinstance(value, Mapping)] or [None]
    plain, *loud = (
        derived_numbers(asked.kind, asked.config, dict.fromkeys(layer_types, parameters))
        for parameters in (_PLAIN, *_DISTINCT)
    )
    return any(found != plain for found in loud)


def derived_numbers(kind: type[PreTrainedModel], config: Any, changed: Parameters | None = None) -> Numbers:
    """The numbers that the modules of a model hold, but for its rotary modules.

    Args:
        changed: scalings that take the place of the config's.

    Raises:
        UnsupportedModel: no such model can be built.
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
            f"{kind.__name__} cannot be built from its config alone ({type(error).__name__}: {error}), so it cannot be "
            "seen what else than its frequencies depends on rope_parameters"
        ) from error
    return {
        (name, attribute): value
        for name, module in model.named_modules()
        if not any(key.endswith("inv_freq") for key in module._buffers)
        for attribute, value in vars(module).items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _replaced(own: Mapping[str, Any], changed: Parameters) -> dict[str, Any]:
    """`rope_parameters` with another scaling, and what else they say of the family."""
    if None in changed:
        return {**{key: value for key, value in own.items() if key not in _SCALING_KEYS}, **changed[None]}
    return {key: _replaced(value, {None: changed[key]}) if key in changed else value for key, value in own.items()}
