"""How many tokens engines serve unless they are told otherwise: each goes by keys of its own.

They read transformers' config object: keys of the file, defaults of its family, and other names for the same value
(`n_positions`). Read in the engines' sources in November 2026; vLLM's rule is compared with its own `ModelConfig`
(docs/export.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable

from ..errors import ConfigError
from .reading import EngineRope

__all__ = ["SERVED"]

_LARGEST = "model_max_length"  # Command-R's
_VLLM_KEYS = (
    *("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", _LARGEST),
    *("max_target_positions", "max_sequence_length", "max_seq_length", "seq_len"),
)
_SGLANG_KEYS = ("max_sequence_length", "seq_length", "max_seq_len", _LARGEST, "max_position_embeddings")
_LLAMA_CPP_FIRST = {"cohere": _LARGEST, "phi": "n_positions", "phi3": "n_positions", "phimoe": "n_positions"}
"""The key that its converter prefers to `max_position_embeddings`, by model_type."""


def _transformers(raw: EngineRope) -> int:
    return raw.max_length


def _vllm(raw: EngineRope) -> int:
    """`model_max_length`, or the least of all keys; times the factor of linear, dynamic and proportional scaling.

    A LongRoPE model whose trained length stands outside of its rope parameters is served up to that length. The length
    of Gemma 3 is that after scaling.
    """
    length = _value(raw, _LARGEST) or min(_values(raw, _VLLM_KEYS))
    if raw.kind == "longrope":
        return int(_value(raw, "original_max_position_embeddings") or length)
    return int(length) if "gemma3" in raw.config.model_type else int(length * _factor(raw))


def _sglang(raw: EngineRope) -> int:
    return int(_values(raw, _SGLANG_KEYS)[0] * _factor(raw))


def _llama_cpp(raw: EngineRope) -> int:
    """`context_length` as its converter writes it."""
    first = _LLAMA_CPP_FIRST.get(raw.config.model_type)
    return int((first and _value(raw, first)) or raw.max_length)


def _factor(raw: EngineRope) -> float:
    """1 for the types that know their trained length: theirs is the length after scaling."""
    is_trained_known = raw.kind in ("yarn", "longrope", "llama3")
    return 1.0 if is_trained_known else float(raw.get("factor") or 1.0)


def _values(raw: EngineRope, keys: tuple[str, ...]) -> list[float]:
    return [value for key in keys if (value := _value(raw, key)) is not None]


def _value(raw: EngineRope, key: str) -> float | None:
    value = getattr(raw.config, key, None)
    if value is not None and not (isinstance(value, int | float) and math.isfinite(value)):
        raise ConfigError(f"{key}={value!r:.40} must be a number of tokens; engines read it")
    return value


SERVED: dict[str, Callable[[EngineRope], int]] = {
    "transformers": _transformers,
    "vLLM": _vllm,
    "SGLang": _sglang,
    "llama.cpp": _llama_cpp,
}
"""Tokens by the engine's name. Engines that are not here serve any length."""
