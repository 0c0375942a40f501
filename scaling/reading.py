"""What an engine makes of a rotary config: a scaler, and what a user should know."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from . import hf
from .longrope import LongRoPE
from .rope import Frequencies, RopeSpec, Scaler

__all__ = ["EngineRope", "Reading", "agrees"]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What an engine makes of a config.

    Attributes:
        engine: a key of `ENGINES`.
        rope: the geometry that it reckons with.
        scaler: what it does to the plain frequencies; None if it refuses the config, or is not read.
        max_length: tokens that it serves unless it is told otherwise; None where the config does not limit it.
        notes: what a user should know, sentences.
        is_read: False where its sources have not been read for such a config, so that nothing is known.
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
        """For a text of `length` tokens."""
        return None if self.scaler is None else self.scaler.frequencies(self.rope, length)


@dataclass(frozen=True, kw_only=True)
class EngineRope:
    """The rotary part of a config as the engines find it.

    Args:
        config: transformers' config object of the text model.
        parameters: `rope_parameters`, or what transformers makes of the older `rope_scaling`.
        configured: as transformers computes it.
        has_old: the file has `rope_scaling` or a `rope_theta`, as transformers 4 wrote them.
    """

    config: Any
    parameters: Mapping[str, Any]
    configured: hf.ConfiguredRope
    has_old: bool

    @property
    def kind(self) -> str:
        """`rope_type`."""
        return str(self.parameters.get("rope_type", "default"))

    @property
    def rope(self) -> RopeSpec:
        """As transformers reckons."""
        return self.configured.rope

    @property
    def scaler(self) -> Scaler:
        """As transformers reckons."""
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
        """A value of `parameters`; None if it is not there."""
        return self.parameters.get(key)


def agrees(one: Reading, other: Reading, length: int) -> bool:
    """True if two engines compute the same for a text of `length` tokens."""
    a, b = one.frequencies(length), other.frequencies(length)
    if a is None or b is None:
        return False
    same = torch.allclose(a.inv_freq, b.inv_freq, rtol=1e-5, atol=1e-12)
    return same and math.isclose(a.attention_factor, b.attention_factor, rel_tol=1e-6)
