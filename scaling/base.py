"""Methods that only change the rotary base."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from typing import ClassVar

from ..errors import ConfigError
from .rope import Facet, Frequencies, RopeSpec, Scaler


def with_base(rope: RopeSpec, base: float) -> Frequencies:
    """The frequencies of another base; the model's own, to the bit, if it is the same one."""
    return Frequencies(rope.theta * (base / rope.base) ** -rope.exponents)


@dataclass(frozen=True, kw_only=True)
class Base(Scaler):
    """A base chosen by hand: theta_i = base^(-2i/d). Adjusted base frequency (ABF).

    Its reach is that of the NTK factor with the same base. Source: Xiong et al., arXiv 2309.16039.

    Args:
        base: the rotary base, above 1.
    """

    name: ClassVar[str] = "base"
    source: ClassVar[str] = "arXiv 2309.16039"
    facet: ClassVar[Facet] = "frequencies"
    base: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.base) and self.base > 1):
            raise ConfigError(f"base: {self.base:g} must be above 1")

    def reach(self, rope: RopeSpec) -> float:
        stretch = (self.base / rope.base) ** ((rope.dim - 2) / rope.dim)
        return int(rope.trained_length * max(stretch, 1.0))

    def frequencies(self, rope: RopeSpec, length: int | None = None) -> Frequencies:
        return with_base(rope, self.base)


@dataclass(frozen=True, kw_only=True)
class _ForLength(Scaler):
    facet: ClassVar[Facet] = "frequencies"
    length: int = field(metadata={"length": True})

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ConfigError(f"{self.name}: length {self.length} must be at least 1")

    def check(self, rope: RopeSpec) -> None:
        if self.length < rope.trained_length:
            raise ConfigError(
                f"{self.name}: length {self.length} is below the trained length {rope.trained_length}; "
                "ask for at least that"
            )

    def reach(self, rope: RopeSpec) -> float:
        return self.length


@dataclass(frozen=True, kw_only=True)
class CriticalBase(_ForLength):
    """The base that keeps the critical dimension in place: b' = b^(ln(N / 2pi) / ln(L / 2pi)).

    The dimensions up to the critical one, 2 ceil(d/2 log_b(L / 2pi)), made a full turn in training; with
    b' the same dimensions make one over N. Source: Liu et al., arXiv 2310.05209.

    Args:
        length: N, tokens to carry, at least the trained length.
    """

    name: ClassVar[str] = "critical-base"
    source: ClassVar[str] = "arXiv 2310.05209"

    def check(self, rope: RopeSpec) -> None:
        super().check(rope)
        if rope.trained_length <= 2 * math.pi:
            raise ConfigError(
                f"critical-base: no pair turns once within the trained length {rope.trained_length}; "
                "the rule needs one of 7 or more"
            )
        if self._power(rope) * math.log(rope.base) > math.log(sys.float_info.max):
            raise ConfigError(
                f"critical-base: from {rope.trained_length} to {self.length} tokens the base {rope.base:g} becomes its "
                f"power of {self._power(rope):.4g}, more than float64 holds; ask for a shorter length"
            )

    def _power(self, rope: RopeSpec) -> float:
        return math.log(self.length / (2 * math.pi)) / math.log(rope.trained_length / (2 * math.pi))

    def base(self, rope: RopeSpec) -> float:
        """b'."""
        return float(rope.base ** self._power(rope))

    def frequencies(self, rope: RopeSpec, length: int | None = None) -> Frequencies:
        return with_base(rope, self.base(rope))


def critical_dimension(rope: RopeSpec) -> int:
    """2 ceil(d/2 log_b(L / 2pi)): dimensions below it made a full turn over L. arXiv 2310.05209."""
    return 2 * math.ceil(rope.dim / 2 * math.log(rope.trained_length / (2 * math.pi), rope.base))


@dataclass(frozen=True, kw_only=True)
class BaseBound(_ForLength):
    """The smallest base, not below the model's own, that satisfies the base bound for N:
    sum_i cos(m b^(-2i/d)) >= 0 for every 0 <= m < N.

    Source: Men et al., arXiv 2405.14591; kexue.fm/archives/10122; see `scaling.base_bound`.

    Args:
        length: N, tokens to carry, at least the trained length.
    """

    name: ClassVar[str] = "base-bound"
    source: ClassVar[str] = "arXiv 2405.14591"

    def base(self, rope: RopeSpec) -> float:
        """The base chosen."""
        from .base_bound import smallest_feasible_base

        return smallest_feasible_base(self.length, rope.dim, at_least=rope.base)

    def frequencies(self, rope: RopeSpec, length: int | None = None) -> Frequencies:
        return with_base(rope, self.base(rope))
