"""How an engine reads the RoPE of a config, as values: its scaler, notes, and the length that it serves.

The served lengths come from transformers' config object: keys of the file, defaults of its family, and
other names for the same value (`n_positions`). The rules are from the engines' sources in November 2026;
vLLM's rule has been compared with its own `ModelConfig` (docs/export.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import ConfigError
from .configured_rope import ConfiguredRope
from .longrope import LongRoPE
from .rope import Frequencies, RopeSpec, Scaler

__all__ = ["SERVED_LENGTHS", "EngineReading", "EngineRope", "same_frequencies"]


@dataclass(frozen=True, kw_only=True)
class EngineReading:
    """How an engine reads a config.

    Attributes:
        engine: a key of `ENGINES`.
        rope: the geometry that the engine computes with.
        scaler: its change of the plain frequencies; None if it refuses the config, or if `is_read` is False.
        max_length: the tokens that it serves by default; None if the config does not limit it.
        notes: sentences for the user.
        is_read: False if its sources have not been read for such a config, so that its scaler is not known.
    """

    engine: str
    rope: RopeSpec
    scaler: Scaler | None
    max_length: int | None
    notes: tuple[str, ...] = ()
    is_read: bool = True

    @property
    def label(self) -> str:
        """The scaler in one line, without its lists of factors."""
        if not self.is_read:
            return "not read"
        if isinstance(self.scaler, LongRoPE):
            kinds = "factors" if self.scaler.short == self.scaler.long else "short and long factors"
            return f"{len(self.scaler.long)} {kinds}"
        return "refuses it" if self.scaler is None else str(self.scaler)

    def frequencies(self, length: int) -> Frequencies | None:
        """The frequencies for a text of `length` tokens; None without a scaler."""
        return None if self.scaler is None else self.scaler.frequencies(self.rope, length)


@dataclass(frozen=True, kw_only=True)
class EngineRope:
    """The RoPE of a config, the input of all engines.

    Args:
        config: transformers' config object of the text model.
        parameters: `rope_parameters`, which transformers also makes from the older `rope_scaling`.
        configured: the rotary embedding as transformers computes it.
        has_old_keys: True if the file has `rope_scaling` or `rope_theta`, as transformers 4 wrote it.
    """

    config: Any
    parameters: Mapping[str, Any]
    configured: ConfiguredRope
    has_old_keys: bool

    @property
    def kind(self) -> str:
        """`rope_type`."""
        return str(self.parameters.get("rope_type", "default"))

    @property
    def rope(self) -> RopeSpec:
        """The geometry in transformers."""
        return self.configured.rope

    @property
    def scaler(self) -> Scaler:
        """The scaler in transformers."""
        return self.configured.scaler

    @property
    def max_length(self) -> int:
        """`max_position_embeddings`."""
        return int(self.config.max_position_embeddings)

    @property
    def stretch(self) -> float:
        """`max_position_embeddings` over the trained length."""
        return self.max_length / self.rope.trained_length

    def get(self, key: str) -> Any:
        """A value of `parameters`, or None."""
        return self.parameters.get(key)


def same_frequencies(first: EngineReading, second: EngineReading, length: int) -> bool:
    """True if two engines compute the same frequencies for a text of `length` tokens."""
    a, b = first.frequencies(length), second.frequencies(length)
    if a is None or b is None:
        return False
    is_close = torch.allclose(a.inv_freq, b.inv_freq, rtol=1e-5, atol=1e-12)
    return is_close and math.isclose(a.attention_factor, b.attention_factor, rel_tol=1e-6)


_LARGEST = "model_max_length"  # Command-R's
_VLLM_KEYS = (
    *("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", _LARGEST),
    *("max_target_positions", "max_sequence_length", "max_seq_length", "seq_len"),
)
_SGLANG_KEYS = ("max_sequence_length", "seq_length", "max_seq_len", _LARGEST, "max_position_embeddings")
_LLAMA_CPP_FIRST = {"cohere": _LARGEST, "phi": "n_positions", "phi3": "n_positions", "phimoe": "n_positions"}
"""The key that the converter prefers to `max_position_embeddings`, by model_type."""


def _transformers(raw: EngineRope) -> int:
    return raw.max_length


def _vllm(raw: EngineRope) -> int:
    """`model_max_length`, or the smallest of all keys, times the factor of linear, dynamic and proportional scaling.

    A LongRoPE model whose config has its trained length outside of the rope parameters is served up to that length.
    The length of Gemma 3 is the length after scaling.
    """
    length = _value(raw, _LARGEST) or min(_values(raw, _VLLM_KEYS))
    if raw.kind == "longrope":
        return int(_value(raw, "original_max_position_embeddings") or length)
    return int(length) if "gemma3" in raw.config.model_type else int(length * _factor(raw))


def _sglang(raw: EngineRope) -> int:
    return int(_values(raw, _SGLANG_KEYS)[0] * _factor(raw))


def _llama_cpp(raw: EngineRope) -> int:
    """The `context_length` that its converter writes."""
    first = _LLAMA_CPP_FIRST.get(raw.config.model_type)
    return int((first and _value(raw, first)) or raw.max_length)


def _factor(raw: EngineRope) -> float:
    """The factor; 1 for types with a trained length, because their config has the length after scaling."""
    is_trained_known = raw.kind in ("yarn", "longrope", "llama3")
    return 1.0 if is_trained_known else float(raw.get("factor") or 1.0)


def _values(raw: EngineRope, keys: tuple[str, ...]) -> list[float]:
    return [value for key in keys if (value := _value(raw, key)) is not None]


def _value(raw: EngineRope, key: str) -> float | None:
    value = getattr(raw.config, key, None)
    if value is not None and not (isinstance(value, int | float) and math.isfinite(value)):
        raise ConfigError(f"{key}={value!r:.40} must be a number of tokens, because engines read it")
    return value


SERVED_LENGTHS: dict[str, Callable[[EngineRope], int]] = {
    "transformers": _transformers,
    "vLLM": _vllm,
    "SGLang": _sglang,
    "llama.cpp": _llama_cpp,
}
"""The served tokens, by the engine's name. Engines that are not listed serve any length."""
