"""The rules that say which base a length needs, side by side, each compared with the base bound."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import ROUND_CEILING, Context, Decimal

from ..errors import ConfigError
from .base import Base, BaseBound, CriticalBase
from .base_bound import ASYMPTOTIC, RESOLUTION, first_failure, largest_infeasible_base, smallest_feasible_base
from .interpolation import NTK
from .rope import RopeSpec, Scaler

FIT = (0.0424, 1.628)
"""c and p of the fit c N^p to the smallest feasible bases for d = 128, 1k to 1M: figure 1 of arXiv 2405.14591."""


@dataclass(frozen=True, kw_only=True)
class BaseRule:
    """What one rule answers.

    Attributes:
        name: of the rule, in a few words.
        assumes: what it takes to be enough, in a few words.
        base: the base that it gives.
        fails_at: the first distance below N at which that base breaks the base bound; None if it carries all N.
        spec: the scaler with this base; for `base-bound` it is the same to 1e-10 (relative).
    """

    name: str
    assumes: str
    base: float
    fails_at: int | None
    spec: str


def base_rules(rope: RopeSpec, length: int) -> tuple[BaseRule, ...]:
    """What every rule answers for N = `length` on this model; the first is the model's own base.

    The fit and the limit are rounded to six digits, more than their constants have. CPU time as of
    `smallest_feasible_base`, which is asked for the smallest base of all, and again from the model's own on where
    that is larger.

    Raises:
        ConfigError: `length` is below the trained length, not all pairs turn, or the dimension is below 6.
    """
    _check(rope, length)
    stretch = length / rope.trained_length
    critical, scale, power = CriticalBase(length=length), *FIT
    critical.check(rope)
    smallest, above = _smallest(rope, length), _every_base_above(rope, length)
    fit, limit = (float(f"{base:.6g}") for base in (scale * length**power, length / ASYMPTOTIC))
    ntk = rope.base * stretch ** (rope.dim / (rope.dim - 2))
    answers: tuple[tuple[str, str, float, Scaler], ...] = (
        ("own base", "the model as trained", rope.base, Base(base=rope.base)),
        ("NTK-aware", "slowest pair N / L times slower, fastest kept", ntk, NTK(factor=stretch)),
        ("critical base", "dimensions that turned over L turn over N", critical.base(rope), critical),
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
    """`base` in ten digits, rounded up: below the edge of its island a base fails."""
    return Context(prec=10, rounding=ROUND_CEILING).create_decimal(repr(base).removesuffix(".0"))


def _check(rope: RopeSpec, length: int) -> None:
    if length < rope.trained_length:
        raise ConfigError(
            f"length {length} is below the trained length {rope.trained_length}; the rules lengthen, so ask for at "
            "least that"
        )
    if rope.rotating_pairs is not None:
        raise ConfigError(
            f"{rope.rotating_pairs} of {rope.dim // 2} pairs turn in this model, and the rules for a base take all to "
            f"turn; ask for the bound alone, with --dim {rope.dim}"
        )


def _smallest(rope: RopeSpec, length: int) -> float:
    smallest = smallest_feasible_base(length, rope.dim)  # `base_report` asks for it too, and it is kept
    return smallest if smallest >= rope.base else smallest_feasible_base(length, rope.dim, at_least=rope.base)


def _every_base_above(rope: RopeSpec, length: int) -> float:
    largest = largest_infeasible_base(length, rope.dim) or 1.0
    return max(rope.base, float(round_up(largest * (1 + RESOLUTION))))
