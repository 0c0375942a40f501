"""Methods that change only the rotary base, and rules for the base that a length needs."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from decimal import ROUND_CEILING, Context, Decimal
from typing import ClassVar

from ..errors import ConfigError
from .base_bound import (
    ASYMPTOTIC,
    RESOLUTION,
    check_sizes,
    first_failure,
    largest_infeasible_base,
    smallest_feasible_base,
)
from .interpolation import NTK
from .rope import Facet, Frequencies, RopeSpec, Scaler


def with_base(rope: RopeSpec, base: float) -> Frequencies:
    """The frequencies with another base. With the same base they are the model's own, bit for bit."""
    return Frequencies(rope.theta * (base / rope.base) ** -rope.exponents)


@dataclass(frozen=True, kw_only=True)
class Base(Scaler):
    """A given base: theta_i = base^(-2i/d). Adjusted base frequency (ABF).

    Its reach is that of `ntk` with the factor that gives the same base. Source: Xiong et al., arXiv 2309.16039.

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
                "take at least the trained length"
            )

    def reach(self, rope: RopeSpec) -> float:
        return self.length


@dataclass(frozen=True, kw_only=True)
class CriticalBase(_ForLength):
    """The base that keeps the critical dimension in place: b' = b^(ln(N / 2pi) / ln(L / 2pi)).

    The dimensions up to the critical one, 2 ceil(d/2 log_b(L / 2pi)), completed a full rotation in training. With
    b' the same dimensions complete one over N. Source: Liu et al., arXiv 2310.05209.

    Args:
        length: N, the target length in tokens, at least the trained length.
    """

    name: ClassVar[str] = "critical-base"
    source: ClassVar[str] = "arXiv 2310.05209"

    def check(self, rope: RopeSpec) -> None:
        super().check(rope)
        if rope.trained_length <= 2 * math.pi:
            raise ConfigError(
                f"critical-base: no pair completes a rotation within the trained length {rope.trained_length}; "
                "the rule needs a trained length of at least 7"
            )
        if self._power(rope) * math.log(rope.base) > math.log(sys.float_info.max):
            raise ConfigError(
                f"critical-base: from {rope.trained_length} to {self.length} tokens the base {rope.base:g} is raised "
                f"to the power {self._power(rope):.4g}, which exceeds float64; take a shorter length"
            )

    def _power(self, rope: RopeSpec) -> float:
        return math.log(self.length / (2 * math.pi)) / math.log(rope.trained_length / (2 * math.pi))

    def base(self, rope: RopeSpec) -> float:
        """b'."""
        return float(rope.base ** self._power(rope))

    def frequencies(self, rope: RopeSpec, length: int | None = None) -> Frequencies:
        return with_base(rope, self.base(rope))


@dataclass(frozen=True, kw_only=True)
class BaseBound(_ForLength):
    """The smallest base, not below the model's own, that satisfies the base bound for N:
    sum_i cos(m b^(-2i/d)) >= 0 for every 0 <= m < N.

    Source: Men et al., arXiv 2405.14591; kexue.fm/archives/10122; see `scaling.base_bound`.

    Args:
        length: N, the target length in tokens, at least the trained length.
    """

    name: ClassVar[str] = "base-bound"
    source: ClassVar[str] = "arXiv 2405.14591"

    def check(self, rope: RopeSpec) -> None:
        super().check(rope)
        check_sizes(self.length, rope.dim)

    def base(self, rope: RopeSpec) -> float:
        """The smallest feasible base that is not below the model's own."""
        return smallest_feasible_base(self.length, rope.dim, at_least=rope.base)

    def frequencies(self, rope: RopeSpec, length: int | None = None) -> Frequencies:
        return with_base(rope, self.base(rope))


PAPER_FIT = (0.0424, 1.628)
"""c and p of c N^p, fitted to the smallest feasible bases for d = 128 and 1k to 1M: figure 1 of arXiv 2405.14591."""


@dataclass(frozen=True, kw_only=True)
class BaseRule:
    """The base that one rule gives for a length N.

    Attributes:
        name: name of the rule.
        assumes: the condition that the rule takes as sufficient, in a few words.
        base: the base.
        fails_at: the first distance below N at which this base violates the base bound; None if it holds up to N.
        spec: the spec of the scaler with this base. For `base-bound` the two agree to 1e-10 (relative).
    """

    name: str
    assumes: str
    base: float
    fails_at: int | None
    spec: str


def base_rules(rope: RopeSpec, length: int) -> tuple[BaseRule, ...]:
    """The base of every rule for N = `length` on this model. The first entry is the model's own base.

    The fit and the limit are rounded to six digits, more than their constants have. The CPU time is that of
    `smallest_feasible_base`, which runs once from the smallest base of all, and a second time from the model's own
    base if that is larger.

    Raises:
        ConfigError: `length` is below the trained length, not all pairs rotate, or the dimension is below 6.
    """
    _check(rope, length)
    stretch = length / rope.trained_length
    critical, scale, power = CriticalBase(length=length), *PAPER_FIT
    critical.check(rope)
    smallest, above = _smallest(rope, length), _every_base_above(rope, length)
    fit, limit = (float(f"{base:.6g}") for base in (scale * length**power, length / ASYMPTOTIC))
    ntk = rope.base * stretch ** (rope.dim / (rope.dim - 2))
    answers: tuple[tuple[str, str, float, Scaler], ...] = (
        ("own base", "the model as trained", rope.base, Base(base=rope.base)),
        ("NTK-aware", "slowest pair N / L times slower, fastest kept", ntk, NTK(factor=stretch)),
        ("critical base", "dimensions that rotate fully over L do so over N", critical.base(rope), critical),
        ("smallest feasible", "f >= 0 up to N; larger bases can fail", smallest, BaseBound(length=length)),
        ("every base above", "f >= 0 up to N, for larger bases too", above, Base(base=above)),
        ("paper's fit", f"{scale} N^{power}, made for d = 128, 1k to 1M", fit, Base(base=fit)),
        ("asymptotic", f"N / {ASYMPTOTIC}, the bound as d grows", limit, Base(base=limit)),
    )
    return tuple(
        BaseRule(
            name=name,
            assumes=assumes,
            base=base,
            fails_at=first_failure(base, rope.dim, length),
            spec=str(scaler),
        )
        for name, assumes, base, scaler in answers
    )


def round_up(base: float) -> Decimal:
    """`base` in ten digits, rounded up, because a base below the edge of its island fails."""
    return Context(prec=10, rounding=ROUND_CEILING).create_decimal(repr(base).removesuffix(".0"))


def _check(rope: RopeSpec, length: int) -> None:
    if length < rope.trained_length:
        raise ConfigError(
            f"length {length} is below the trained length {rope.trained_length}; the rules extend it, so take at "
            "least the trained length"
        )
    if rope.rotating_pairs is not None:
        raise ConfigError(
            f"only {rope.rotating_pairs} of {rope.dim // 2} pairs rotate in this model, and the rules for a base need "
            f"all of them; use the bound alone, with --dim {rope.dim}"
        )


def _smallest(rope: RopeSpec, length: int) -> float:
    smallest = smallest_feasible_base(length, rope.dim)  # cached, and `base_report` needs it too
    return smallest if smallest >= rope.base else smallest_feasible_base(length, rope.dim, at_least=rope.base)


def _every_base_above(rope: RopeSpec, length: int) -> float:
    largest = largest_infeasible_base(length, rope.dim) or 1.0
    return max(rope.base, float(round_up(largest * (1 + RESOLUTION))))
