"""The search behind the base bound: intervals of ln b, proved feasible or infeasible whole.

With x = ln b, theta_i = e^(-s_i x), s_i = 2i/d and f(x, m) = sum_i cos(m theta_i):

* going up, an interval is skipped because one distance m fails on all of it. With theta_i = e^(-2i/d x),
  |d^2 f / dx^2| <= sum (m s_i theta_i)^2 + m s_i^2 theta_i for s_i = 2i/d, and that falls as x grows, so from
  f < 0 and its slope at x follows how far f stays below 0;
* going down, an interval is skipped because interval arithmetic gives f > 0 for all its bases and distances.

Everything is float64 and on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

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
