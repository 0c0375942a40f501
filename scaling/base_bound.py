"""Which rotary base does a context need? The base bound and its exact search.

For dim d and base b let f_b(m) = sum_{i < d/2} cos(m b^(-2i/d)): up to a factor, the mean amount by which
attention prefers a similar token over a random one at distance m. A base carries N tokens when
f_b(m) >= 0 for every integer 0 <= m < N. Asymptotically (d -> infinity) that is b >= N / 0.6165.

Feasibility is not monotone in b, and feasible bases form thin islands, so neither bisection nor a
grid over b can be trusted. The search works on intervals of x = ln b, and proves that each interval
is feasible or infeasible as a whole. With s_i = 2i/d, theta_i = e^(-s_i x) and
f(x, m) = sum_i cos(m theta_i):

* Upwards, an interval is skipped because one distance m fails on all of it:
  |d^2 f / dx^2| <= sum (m s_i theta_i)^2 + m s_i^2 theta_i, which falls as x grows, so f < 0 and
  its slope at x tell how far f stays below 0.
* Downwards, an interval is skipped because interval arithmetic gives f > 0 for all its bases and
  distances.

Everything is float64 and on the CPU. Sources: Men et al., arXiv 2405.14591; kexue.fm/archives/10122.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError

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


RESOLUTION = 1e-10
"""Relative width in b below which an island, feasible or not, may be missed."""

_WIDTH = 256  # distances per row, a square: a row costs one phase per pair, the rest follows by angle addition
_ROWS = 256  # rows per matrix product
_HOT = 8  # rows followed from step to step; 8, 16, 32 took 5.8, 6.4, 7.1 s of CPU at N = 128k (one run each)


@contextmanager
def one_thread() -> Iterator[None]:
    """One torch thread inside. The pieces are small: on two busy cores a second thread made it 14 times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _exponents(dim: int) -> Tensor:
    return torch.arange(0, dim, 2, dtype=torch.float64) / dim  # s, [n = d/2]


def _noise(length: int) -> float:
    """More than the rounding error of f below `length`: phases up to m, each to 1e-16 of itself."""
    return 1e-9 + 1e-14 * length


def _inner(theta: Tensor) -> Tensor:
    """e^(i k theta) for k < _WIDTH, as a product of two short tables; theta [n] -> complex [_WIDTH, n]."""
    side = math.isqrt(_WIDTH)
    near = torch.arange(side)[:, None] * theta
    far = side * near
    turns = torch.complex(far.cos(), far.sin())[:, None] * torch.complex(near.cos(), near.sin())
    return turns.flatten(0, 1)


def _starts(theta: Tensor, rows: Tensor) -> Tensor:
    """cos and sin of the phases at each row's first distance: theta [n], rows [r] -> [r, 2n]."""
    phases = (rows * _WIDTH)[:, None] * theta
    return torch.cat([phases.cos(), phases.sin()], 1)


def _rows(length: int) -> Iterator[Tensor]:
    """The rows that hold the distances below `length`, _ROWS at a time."""
    count = -(-length // _WIDTH)
    for start in range(0, count, _ROWS):
        yield torch.arange(start, min(start + _ROWS, count))


def values(base: float, dim: int, limit: int) -> Iterator[tuple[int, Tensor]]:
    """f(m) for every 0 <= m < `limit`, in blocks: a block's first distance, and float64 [its distances].

    The sign is that of the plain sum of cosines.
    """
    theta = base ** -_exponents(dim)
    inner = _inner(theta)
    step = torch.cat([inner.real, -inner.imag], 1).T  # cos(a + b) = cos a cos b - sin a sin b
    for rows in _rows(limit):
        first = int(rows[0]) * _WIDTH
        f = (_starts(theta, rows) @ step).flatten()[: limit - first]
        near_zero = (f.abs() < _noise(limit)).nonzero().flatten()
        for start in range(0, len(near_zero), _ROWS):
            m = near_zero[start : start + _ROWS]
            f[m] = ((m + first)[:, None] * theta).cos().sum(1)
        yield first, f


def find_failure(base: float, dim: int, limit: int) -> int | None:
    for first, f in values(base, dim, limit):
        failing = (f < 0).nonzero()
        if len(failing):
            return first + int(failing[0])
    return None


def climb(length: int, dim: int, base: float) -> float:
    """From an infeasible base up to the first feasible one, each step proved by one failing distance."""
    horizon = min(length, _HOT * _WIDTH)  # low bases fail early, and early failures reach furthest
    hot, usual = torch.arange(0), 0.0
    while True:
        reach = _reach(base, dim, length, hot) if usual else 0.0
        if reach <= 0.3 * usual:
            hot = _hottest(base, dim, horizon)
            usual = reach = _reach(base, dim, length, hot)
            if horizon < length and reach * _phase_speed(base, dim, horizon) < 1:
                horizon, usual = min(2 * horizon, length), 0.0
                continue
        if reach <= RESOLUTION:
            m = find_failure(base, dim, length)
            if m is None:
                return base
            reach = max(RESOLUTION, _reach(base, dim, length, torch.tensor([m // _WIDTH])))
        base *= math.exp(reach)


def _phase_speed(base: float, dim: int, m: int) -> float:
    """How fast the phases at m turn as ln b grows: sqrt(sum (m s theta)^2), radians."""
    s = _exponents(dim)
    return m * float((s * base**-s).square().sum().sqrt())


def _hottest(base: float, dim: int, horizon: int) -> Tensor:
    """The rows below `horizon` whose failures should reach furthest. A hint only, so float32 is enough."""
    theta = base ** -_exponents(dim)
    inner = _inner(theta)
    step = torch.cat([inner.real, -inner.imag], 1).T.float()
    scores = []
    for rows in _rows(horizon):
        f = (_starts(theta, rows).float() @ step).amin(1)
        scores.append(torch.where(f < 0, -f / (rows + 1).square(), -f))  # reach ~ sqrt(-f) / m
    every = torch.cat(scores)
    return every.topk(min(_HOT, len(every))).indices


def _reach(base: float, dim: int, length: int, rows: Tensor) -> float:
    """How far ln b can grow while some one distance m < length in `rows` surely goes on failing; 0 if none fails."""
    s = _exponents(dim)
    theta = base**-s
    inner, weight = _inner(theta), s * theta
    cos, sin = inner.real, inner.imag  # [width, n]
    step = torch.cat([torch.cat([cos, -sin], 1), torch.cat([weight * sin, weight * cos], 1)])  # [2 width, 2n]
    both = _starts(theta, rows) @ step.T
    f, slope = both[:, :_WIDTH], both[:, _WIDTH:]  # [r, width]: f and (df/dx) / m
    m = ((rows * _WIDTH)[:, None] + torch.arange(_WIDTH)).double()
    bend = m * (m * (s * theta).square().sum() + (s.square() * theta).sum())
    slope = m * slope
    value = f + _noise(length)
    failing = (value < 0) & (m < length)
    if not failing.any():
        return 0.0
    value, slope, bend = value[failing], slope[failing], bend[failing]
    # the larger root of value + slope t + bend t^2 / 2 = 0
    return float(((slope.square() - 2 * bend * value).sqrt() - slope).div(bend).max())


def highest_failure(length: int, dim: int, bottom: float, top: float) -> float | None:
    """The largest x = ln b in [bottom, top] that fails below `length`, to RESOLUTION, or None."""
    s = _exponents(dim)
    chunk = max(1, 2**15 // len(s))
    best = -math.inf
    # a box is (first m, last m, lowest x, highest x); the stack is depth first, highest x on top
    stack = [torch.tensor([[0.0, length - 1.0, bottom, top]], dtype=torch.float64)]
    while stack:
        boxes = stack.pop()
        if len(boxes) > chunk:
            stack.append(boxes[:-chunk])
            boxes = boxes[-chunk:]
        boxes = boxes[boxes[:, 3] > best]
        first, last, low, high = boxes[_lower_bound(boxes, s) < _noise(length)].T
        single = first == last
        fails = single & ((last[:, None] * torch.exp(-high[:, None] * s)).cos().sum(1) < 0)
        if fails.any():
            best = max(best, float(high[fails].max()))
        open_ = ~(single & (high - low < RESOLUTION)) & ~fails
        first, last, low, high = (v[open_] for v in (first, last, low, high))
        if not len(first):
            continue
        # factors 0.1 to 0.3 need about as many boxes at N = 1k to 8k; 0.03 up to 1.7 times more
        by_m = last - first > 0.2 * last * (high - low)
        half_m = torch.where(by_m, torch.floor((first + last) / 2), last)
        half_x = torch.where(by_m, low, (low + high) / 2)
        lower = torch.stack([first, half_m, low, torch.where(by_m, high, half_x)], 1)
        upper = torch.stack([torch.where(by_m, half_m + 1, first), last, half_x, high], 1)
        stack.append(torch.cat([lower, upper]))
    return best if best > -math.inf else None


def _lower_bound(boxes: Tensor, s: Tensor) -> Tensor:
    """A lower bound of f over each box: each pair's own minimum over the box's phases; [k, 4] -> [k]."""
    first, last, low, high = boxes.T
    start = first[:, None] * torch.exp(-high[:, None] * s)
    end = last[:, None] * torch.exp(-low[:, None] * s)
    last_trough = (2 * torch.floor((end / math.pi - 1) / 2) + 1) * math.pi  # the last odd multiple of pi
    return torch.where(last_trough >= start, -1.0, torch.minimum(start.cos(), end.cos())).sum(1)
