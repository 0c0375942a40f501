"""DPRoPE: each rotary pair is interpolated or not, by the distribution of its angles."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import ConfigError
from .rope import Factored, Frequencies, RopeSpec

_BINS = 360
_EMPTY = 2.0**-14  # added to every count, as in the public code, so that each logarithm is finite
_LONGEST = 1 << 20  # tokens whose angles are counted


@dataclass(frozen=True, kw_only=True)
class DPRoPE(Factored):
    """DPRoPE: each pair gets theta_i or theta_i / s, the one whose angles over s L tokens are distributed more like
    those of theta_i over L.

    The distance of two distributions is sum P ln(P / Q) over 360 bins of the angle modulo 2pi, P the one over L. With
    equal distances the pair does not change. Source: Wu et al., arXiv 2410.01490.
    """

    name: ClassVar[str] = "dprope"
    source: ClassVar[str] = "arXiv 2410.01490"

    def check(self, rope: RopeSpec) -> None:
        if self.reach(rope) > _LONGEST:
            raise ConfigError(
                f"dprope: it counts the angles of {self.factor:g} times {rope.trained_length} tokens, and the most is "
                f"{_LONGEST}; take a smaller factor"
            )

    def frequencies(self, rope: RopeSpec, length: int | None = None) -> Frequencies:
        self.check(rope)
        return Frequencies(rope.theta / _divisors(rope, self.factor))


@functools.lru_cache(maxsize=64)
def _divisors(rope: RopeSpec, factor: float) -> Tensor:
    """1 or the factor for every pair, float64 [d/2]."""
    trained_length, length = rope.trained_length, math.ceil(rope.trained_length * factor)
    chosen = []
    for theta in rope.theta.tolist():
        trained = _distribution(theta, trained_length)
        kept, divided = (_distance(trained, _distribution(scaled, length)) for scaled in (theta, theta / factor))
        chosen.append(factor if divided < kept else 1.0)
    return torch.tensor(chosen, dtype=torch.float64)


def _distribution(theta: float, length: int) -> Tensor:
    """The share of the angles of `length` tokens in every bin."""
    angles = torch.arange(length, dtype=torch.float64) * theta % (2 * math.pi)
    bins = (angles * (_BINS / (2 * math.pi))).long().clamp(max=_BINS - 1)
    return (torch.bincount(bins, minlength=_BINS) + _EMPTY) / length


def _distance(trained: Tensor, other: Tensor) -> float:
    return float((trained * (trained / other).log()).sum())
