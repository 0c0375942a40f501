"""Which rotary base does a context need? The base bound and its exact search.

For dim d and base b let f_b(m) = sum_{i < d/2} cos(m b^(-2i/d)): up to a factor, the mean amount by which
attention prefers a similar token over a random one at distance m. A base carries N tokens when
f_b(m) >= 0 for every integer 0 <= m < N. Asymptotically (d -> infinity) that is b >= N / 0.6165.

Feasibility is not monotone in b, and feasible bases form thin islands, so neither bisection nor a grid over
b can be trusted; `base_search` works on intervals of ln b and proves what it skips.

Everything is float64. Sources: Men et al., arXiv 2405.14591; kexue.fm/archives/10122.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError
from .base_search import RESOLUTION, climb, find_failure, highest_failure, one_thread, values

__all__ = [
    "ASYMPTOTIC",
    "RESOLUTION",
    "BaseAnswer",
    "base_report",
    "ceiling_base",
    "first_failure",
    "largest_infeasible_base",
    "preference",
    "smallest_feasible_base",
]

ASYMPTOTIC = 0.6165
"""The zero of the cosine integral: as d grows, the bound becomes b >= N / 0.6165."""

_ABOVE_ONE = 1 + 1e-6  # where the search for the smallest base starts: b = 1 itself is no rotary base


@dataclass(frozen=True, kw_only=True)
class BaseAnswer:
    """What the base bound says about a context length.

    Attributes:
        length: N, tokens to carry.
        dim: d, rotated dimensions of a head.
        smallest_feasible: the smallest base that carries N. It may sit on a thin island: slightly larger bases
            can fail.
        largest_infeasible: the largest base that fails; every base above it carries N. None if none fails.
        ceiling: a base from which on feasibility follows from a closed form; the search ran up to here.
        asymptotic: N / 0.6165, the bound's limit for many dimensions.
        resolution: relative width in b below which an island may have been missed.
        base: the user's own base, or None.
        fails_at: the first distance below N at which `base` fails, so it carries that many tokens; None if it
            carries all N, or if no base was given.
    """

    length: int
    dim: int
    smallest_feasible: float
    largest_infeasible: float | None
    ceiling: float
    asymptotic: float
    resolution: float
    base: float | None
    fails_at: int | None


def base_report(length: int, dim: int, *, base: float | None = None) -> BaseAnswer:
    """All that the base bound answers for N = `length` and d = `dim`; `base` is the user's own, if any.

    Raises:
        ConfigError: as `smallest_feasible_base`, or `base` not above 1.
    """
    fails_at = None if base is None else first_failure(base, dim, length)
    return BaseAnswer(
        length=length,
        dim=dim,
        smallest_feasible=smallest_feasible_base(length, dim),
        largest_infeasible=largest_infeasible_base(length, dim),
        ceiling=ceiling_base(length, dim),
        asymptotic=length / ASYMPTOTIC,
        resolution=RESOLUTION,
        base=base,
        fails_at=fails_at,
    )


def first_failure(base: float, dim: int, limit: int) -> int | None:
    """The first integer 0 <= m < `limit` with f_b(m) < 0, or None: how many tokens a base carries.

    Decided by the plain float64 sum of cos(m * base^(-2i/d)). If at least half of a head's dimensions are not
    rotated at all, their cos is 1 and f >= 0 always; that case needs no search, and `dim` here counts the
    rotated dimensions only.

    Raises:
        ConfigError: dim odd or below 2, limit below 1, or base not above 1.
    """
    _check(limit, dim, fewest=2)
    _check_base(base)
    with one_thread():
        return find_failure(base, dim, limit)


def preference(base: float, dim: int, length: int) -> Tensor:
    """f_b(m) for every distance 0 <= m < `length`, float64 [length]; its signs are those of `first_failure`.

    Raises:
        ConfigError: as `first_failure`.
    """
    _check(length, dim, fewest=2)
    _check_base(base)
    with one_thread():
        return torch.cat([f for _, f in values(base, dim, length)])


@functools.lru_cache(maxsize=64)  # a scaler asks again for every model it is put into
def smallest_feasible_base(length: int, dim: int, *, at_least: float = _ABOVE_ONE) -> float:
    """The smallest base, not below `at_least`, that carries N = `length` tokens.

    `at_least` is returned unchanged if it is feasible. Otherwise the answer is the left edge of the first
    island of feasible bases: `first_failure` finds nothing for it, and every base in [at_least, answer) was
    shown to fail, except that an island narrower than 1e-10 (relative, `RESOLUTION`) may have been stepped
    over, and that the answer may lie that far right of the true edge. A rounded answer may fail.

    CPU time for d = 128 on one core: 2 s at N = 32k, 5 s at 128k, 24 s at 1M.

    Raises:
        ConfigError: dim odd or below 6, length below 1, or at_least not above 1.
    """
    _check(length, dim, fewest=6)
    _check_base(at_least)
    with one_thread():
        if find_failure(at_least, dim, length) is None:
            return at_least
        return climb(length, dim, at_least)


@functools.lru_cache(maxsize=64)
def largest_infeasible_base(length: int, dim: int) -> float | None:
    """The largest base that fails within N = `length`: all bases above it carry N. None if no base fails.

    Branch and bound from `ceiling_base` downwards over boxes of (distance, ln b). The answer itself fails, and
    everything above it was shown to be feasible, except that an island of failing bases narrower than 1e-10
    (relative, `RESOLUTION`) may have been missed.

    Raises:
        ConfigError: dim odd or below 6, or length below 1.
    """
    _check(length, dim, fewest=6)
    if length < 3:
        return None  # f(0) = d/2 and f(1) >= d/2 cos(1) > 0 for every base; at m = 2 bases near 1 fail
    top, found = math.log(ceiling_base(length, dim)), None
    with one_thread():
        while found is None:
            bottom = max(top - 0.5, 0.0)
            found, top = highest_failure(length, dim, bottom, top), bottom
        base = math.exp(found)
        while find_failure(base, dim, length) is None:  # exp may round across the edge
            base *= 1 - RESOLUTION
    return base


def ceiling_base(length: int, dim: int) -> float:
    """A base from which on every base carries N = `length`, by a closed form.

    Where (N-1) theta_i <= pi, cos(m theta_i) >= cos((N-1) theta_i); the other pairs are at least -1. The sum of
    these bounds grows with b, so here (and only here) bisection is sound. For d = 128 it is 0.65 to 0.8 N^2.

    Raises:
        ConfigError: dim odd or below 6, or length below 1.
    """
    _check(length, dim, fewest=6)

    def safe(x: float) -> bool:
        phases = [(length - 1) * math.exp(-2 * i / dim * x) for i in range(dim // 2)]
        return sum(math.cos(p) if p <= math.pi else -1.0 for p in phases) >= 0

    low, high = 0.0, 1.0
    while not safe(high):
        low, high = high, 2 * high
    while high - low > RESOLUTION:
        middle = (low + high) / 2
        low, high = (low, middle) if safe(middle) else (middle, high)
    return math.exp(high)


def _check(length: int, dim: int, *, fewest: int) -> None:
    if dim % 2 or dim < fewest:
        raise ConfigError(f"base bound: dim {dim} must be even and at least {fewest}")
    if length < 1:
        raise ConfigError(f"base bound: length {length} must be at least 1")


def _check_base(base: float) -> None:
    if not (math.isfinite(base) and base > 1):
        raise ConfigError(f"base bound: base {base:g} must be above 1")
