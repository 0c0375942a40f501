"""The base bound, the condition on the rotary base for a context length, and its exact search.

For dimension d and base b let f_b(m) = sum_{i < d/2} cos(m b^(-2i/d)). Up to a factor, it is the mean
amount by which attention prefers a similar token at distance m to a random one. A base is feasible
for N tokens if f_b(m) >= 0 for every integer 0 <= m < N. For d -> infinity that means b >= N / 0.6165.

Feasibility is not monotone in b, and feasible bases form thin islands. Bisection or a grid over b can
miss them. The search works on intervals of x = ln b, and proves that a whole interval is feasible or
infeasible. With s_i = 2i/d, theta_i = e^(-s_i x) and f(x, m) = sum_i cos(m theta_i):

* Upwards, it skips an interval on which one distance m always fails. The bound
  |d^2 f / dx^2| <= sum (m s_i theta_i)^2 + m s_i^2 theta_i falls as x grows. So f < 0 and the slope
  at x give an interval on which f stays below 0.
* Downwards, it skips an interval for which interval arithmetic gives f > 0 at all bases and distances.

All computations are float64 on the CPU. Sources: Men et al., arXiv 2405.14591; kexue.fm/archives/10122.
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
from .lengths import format_length

__all__ = [
    "ASYMPTOTIC",
    "LONGEST",
    "RESOLUTION",
    "BaseAnswer",
    "base_report",
    "ceiling_base",
    "check_sizes",
    "first_failure",
    "largest_infeasible_base",
    "preference",
    "smallest_feasible_base",
]

ASYMPTOTIC = 0.6165
"""The zero of the cosine integral. As d grows, the bound becomes b >= N / 0.6165."""

LONGEST = 2**24
"""The largest length that is searched, tokens."""

_ABOVE_ONE = 1 + 1e-6  # start of the search for the smallest base; b = 1 is not a rotary base


@dataclass(frozen=True, kw_only=True)
class BaseAnswer:
    """The results of the base bound for a context length.

    Attributes:
        length: N, the target length in tokens.
        dim: d, the rotated dimensions of a head.
        smallest_feasible: the smallest base that is feasible for N. It can lie on a thin island, so slightly larger
            bases can fail.
        largest_infeasible: the largest base that fails; every base above it is feasible. None if none fails.
        ceiling: a closed form shows that every base from here on is feasible. The search starts here.
        asymptotic: N / 0.6165, the limit of the bound for many dimensions.
        resolution: relative width in b below which the search can miss an island.
        base: the user's base, or None.
        fails_at: the first distance below N at which `base` fails, which is the number of tokens that it is feasible
            for. None if it is feasible for N, or without `base`.
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
    """All results of the base bound for N = `length` and d = `dim`, and for the user's `base` if it is given.

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
    """The first integer 0 <= m < `limit` with f_b(m) < 0, or None. It is the length that the base is feasible for.

    The plain float64 sum of cos(m * base^(-2i/d)) decides. `dim` counts the rotated dimensions only. If at least half
    of a head's dimensions are not rotated, their cos is 1, f >= 0 always holds, and no search is needed.

    Raises:
        ConfigError: dim odd or below 2, limit below 1 or above `LONGEST`, or base not above 1.
    """
    check_sizes(limit, dim, fewest=2)
    _check_base(base)
    with _one_thread():
        return _find_failure(base, dim, limit)


def preference(base: float, dim: int, length: int) -> Tensor:
    """f_b(m) for every distance 0 <= m < `length`, float64 [length], with the signs that `first_failure` uses.

    Raises:
        ConfigError: as `first_failure`.
    """
    check_sizes(length, dim, fewest=2)
    _check_base(base)
    with _one_thread():
        return torch.cat([f for _, f in _preference_blocks(base, dim, length)])


@functools.lru_cache(maxsize=64)  # a scaler calls it for every model that it is applied to
def smallest_feasible_base(length: int, dim: int, *, at_least: float = _ABOVE_ONE) -> float:
    """The smallest base, not below `at_least`, that is feasible for N = `length` tokens.

    `at_least` itself is returned if it is feasible. Otherwise the result is the left edge of the first island of
    feasible bases. `first_failure` finds no failure for it, and every base in [at_least, result) is proved to fail,
    with two exceptions: the search can miss an island narrower than 1e-10 (relative, `RESOLUTION`), and the result can
    lie that far to the right of the true edge. A rounded result can fail.

    CPU time for d = 128 on one core: 2 s at N = 32k, 5 s at 128k, 24 s at 1M.

    Raises:
        ConfigError: dim odd or below 6, length below 1 or above `LONGEST`, or at_least not above 1.
    """
    check_sizes(length, dim)
    _check_base(at_least)
    with _one_thread():
        if _find_failure(at_least, dim, length) is None:
            return at_least
        return _first_feasible_above(length, dim, at_least)


@functools.lru_cache(maxsize=64)
def largest_infeasible_base(length: int, dim: int) -> float | None:
    """The largest base that fails within N = `length`; all bases above it are feasible. None if no base fails.

    This is branch and bound from `ceiling_base` downwards over boxes of (distance, ln b). The result itself fails, and
    every base above it is proved to be feasible, except that the search can miss an island of failing bases narrower
    than 1e-10 (relative, `RESOLUTION`).

    Raises:
        ConfigError: dim odd or below 6, or length below 1 or above `LONGEST`.
    """
    check_sizes(length, dim)
    if length < 3:
        return None  # f(0) = d/2 and f(1) >= d/2 cos(1) > 0 for every base; at m = 2 bases near 1 fail
    top, highest = math.log(ceiling_base(length, dim)), None
    with _one_thread():
        while highest is None:
            bottom = max(top - 0.5, 0.0)
            highest, top = _highest_failure(length, dim, bottom, top), bottom
        base = math.exp(highest)
        while _find_failure(base, dim, length) is None:  # exp can round to the other side of the edge
            base *= 1 - RESOLUTION
    return base


def ceiling_base(length: int, dim: int) -> float:
    """A base from which every base is feasible for N = `length`, by a closed form.

    If (N-1) theta_i <= pi, then cos(m theta_i) >= cos((N-1) theta_i). The other terms are at least -1. The sum of
    these bounds grows with b, so bisection is correct here, and only here. For d = 128 it is 0.65 to 0.8 N^2.

    Raises:
        ConfigError: dim odd or below 6, or length below 1 or above `LONGEST`.
    """
    check_sizes(length, dim)

    def safe(x: float) -> bool:
        phases = [(length - 1) * math.exp(-2 * i / dim * x) for i in range(dim // 2)]
        return sum(math.cos(min(p, math.pi)) for p in phases) >= 0

    low, high = 0.0, 1.0
    while not safe(high):
        low, high = high, 2 * high
    while high - low > RESOLUTION:
        middle = (low + high) / 2
        low, high = (low, middle) if safe(middle) else (middle, high)
    return math.exp(high)


def check_sizes(length: int, dim: int, *, fewest: int = 6) -> None:
    """Raise ConfigError for a length or a dimension that is not searched."""
    if dim % 2 or dim < fewest:
        raise ConfigError(f"base bound: dim {dim} must be even and at least {fewest}")
    if length < 1:
        raise ConfigError(f"base bound: length {length} must be at least 1")
    if length > LONGEST:
        raise ConfigError(
            f"base bound: length {format_length(length)} is above {format_length(LONGEST)}, beyond which the search "
            "takes many minutes; take a shorter one"
        )


def _check_base(base: float) -> None:
    if not (math.isfinite(base) and base > 1):
        raise ConfigError(f"base bound: base {base:g} must be above 1")


RESOLUTION = 1e-10
"""Relative width in b below which the search can miss an island, feasible or not."""

_WIDTH = 256  # distances per row, a square number; a row costs one phase per pair, and angle addition gives the rest
_ROWS = 256  # rows per matrix product
_CANDIDATES = 8  # rows used for several steps; 8, 16, 32 took 5.8, 6.4, 7.1 s of CPU at N = 128k (one run each)


@contextmanager
def _one_thread() -> Iterator[None]:
    """One torch thread inside. The tensors are small: on two busy cores a second thread made it 14 times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _exponents(dim: int) -> Tensor:
    return torch.arange(0, dim, 2, dtype=torch.float64) / dim  # s, [n = d/2]


def _noise(length: int) -> float:
    """An upper bound of the rounding error of f below `length`: phases up to m, with a relative error of 1e-16."""
    return 1e-9 + 1e-14 * length


def _inner(theta: Tensor) -> Tensor:
    """e^(i k theta) for k < _WIDTH, as a product of two short tables; theta [n] -> complex [_WIDTH, n]."""
    side = math.isqrt(_WIDTH)
    near = torch.arange(side)[:, None] * theta
    far = side * near
    rotations = torch.complex(far.cos(), far.sin())[:, None] * torch.complex(near.cos(), near.sin())
    return rotations.flatten(0, 1)


def _starts(theta: Tensor, rows: Tensor) -> Tensor:
    """cos and sin of the phases at the first distance of each row: theta [n], rows [r] -> [r, 2n]."""
    phases = (rows * _WIDTH)[:, None] * theta
    return torch.cat([phases.cos(), phases.sin()], 1)


def _rows(length: int) -> Iterator[Tensor]:
    """The indices of the rows with the distances below `length`, _ROWS at a time."""
    count = -(-length // _WIDTH)
    for start in range(0, count, _ROWS):
        yield torch.arange(start, min(start + _ROWS, count))


def _preference_blocks(base: float, dim: int, limit: int) -> Iterator[tuple[int, Tensor]]:
    """f(m) for every 0 <= m < `limit`, in blocks: the first distance of a block, and float64 [distances in it].

    The signs are those of the plain sum of cosines.
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


def _find_failure(base: float, dim: int, limit: int) -> int | None:
    for first, f in _preference_blocks(base, dim, limit):
        failing = (f < 0).nonzero()
        if len(failing):
            return first + int(failing[0])
    return None


def _first_feasible_above(length: int, dim: int, base: float) -> float:
    """The first feasible base above an infeasible one. One failing distance proves each step."""
    horizon = min(length, _CANDIDATES * _WIDTH)  # low bases fail early, and early failures allow the largest steps
    rows, usual = torch.arange(0), 0.0
    while True:
        reach = _reach(base, dim, length, rows) if usual else 0.0
        if reach <= 0.3 * usual:
            rows = _candidate_rows(base, dim, horizon)
            usual = reach = _reach(base, dim, length, rows)
            if horizon < length and reach * _phase_speed(base, dim, horizon) < 1:
                horizon, usual = min(2 * horizon, length), 0.0
                continue
        if reach <= RESOLUTION:
            m = _find_failure(base, dim, length)
            if m is None:
                return base
            reach = max(RESOLUTION, _reach(base, dim, length, torch.tensor([m // _WIDTH])))
        base *= math.exp(reach)


def _phase_speed(base: float, dim: int, m: int) -> float:
    """How fast the phases at m change as ln b grows: sqrt(sum (m s theta)^2), radians."""
    s = _exponents(dim)
    return m * float((s * base**-s).square().sum().sqrt())


def _candidate_rows(base: float, dim: int, horizon: int) -> Tensor:
    """The rows below `horizon` whose failures should allow the largest step. An estimate, so float32 is enough."""
    theta = base ** -_exponents(dim)
    inner = _inner(theta)
    step = torch.cat([inner.real, -inner.imag], 1).T.float()
    scores = []
    for rows in _rows(horizon):
        f = (_starts(theta, rows).float() @ step).amin(1)
        scores.append(torch.where(f < 0, -f / (rows + 1).square(), -f))  # reach ~ sqrt(-f) / m
    all_scores = torch.cat(scores)
    return all_scores.topk(min(_CANDIDATES, len(all_scores))).indices


def _reach(base: float, dim: int, length: int, rows: Tensor) -> float:
    """How far ln b can grow while one distance m < length in `rows` is proved to fail; 0 if none fails."""
    s = _exponents(dim)
    theta = base**-s
    inner, weight = _inner(theta), s * theta
    cos, sin = inner.real, inner.imag  # [width, n]
    step = torch.cat([torch.cat([cos, -sin], 1), torch.cat([weight * sin, weight * cos], 1)])  # [2 width, 2n]
    both = _starts(theta, rows) @ step.T
    f, slope = both[:, :_WIDTH], both[:, _WIDTH:]  # [r, width]: f and (df/dx) / m
    m = ((rows * _WIDTH)[:, None] + torch.arange(_WIDTH)).double()
    curvature = m * (m * (s * theta).square().sum() + (s.square() * theta).sum())
    slope = m * slope
    value = f + _noise(length)
    failing = (value < 0) & (m < length)
    if not failing.any():
        return 0.0
    value, slope, curvature = value[failing], slope[failing], curvature[failing]
    # the larger root of value + slope t + curvature t^2 / 2 = 0
    return float(((slope.square() - 2 * curvature * value).sqrt() - slope).div(curvature).max())


def _highest_failure(length: int, dim: int, bottom: float, top: float) -> float | None:
    """The largest x = ln b in [bottom, top] that fails below `length`, within RESOLUTION, or None."""
    s = _exponents(dim)
    chunk = max(1, 2**15 // len(s))
    best = -math.inf
    # a box is (first m, last m, lowest x, highest x); the search is depth first, with the highest x on top
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
        # factors of 0.1 to 0.3 need about the same number of boxes at N = 1k to 8k; 0.03 needs up to 1.7 times more
        by_m = last - first > 0.2 * last * (high - low)
        half_m = torch.where(by_m, torch.floor((first + last) / 2), last)
        half_x = torch.where(by_m, low, (low + high) / 2)
        lower = torch.stack([first, half_m, low, torch.where(by_m, high, half_x)], 1)
        upper = torch.stack([torch.where(by_m, half_m + 1, first), last, half_x, high], 1)
        stack.append(torch.cat([lower, upper]))
    return best if best > -math.inf else None


def _lower_bound(boxes: Tensor, s: Tensor) -> Tensor:
    """A lower bound of f over each box: the sum of each pair's minimum over the phases of the box; [k, 4] -> [k]."""
    first, last, low, high = boxes.T
    start = first[:, None] * torch.exp(-high[:, None] * s)
    end = last[:, None] * torch.exp(-low[:, None] * s)
    last_trough = (2 * torch.floor((end / math.pi - 1) / 2) + 1) * math.pi  # the last odd multiple of pi
    return torch.where(last_trough >= start, -1.0, torch.minimum(start.cos(), end.cos())).sum(1)
