"""The static frequency methods as scalars straight from the papers (`STATIC`), and the stretch of every pair.

Symbols as in the papers: d rotary dimension, b base, L trained length, s factor, i pair index,
lambda_i = theta_i / theta'_i the stretch of pair i, m the factor on cos and sin.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from hypothesis import strategies as st

from ropewalk.scaling import (
    NTK,
    AlphaRoPE,
    Base,
    CriticalBase,
    Linear,
    Llama3,
    MrRoPE,
    NTKByParts,
    NTKFixed,
    NTKMixed,
    RopeSpec,
    Scaler,
    YaRN,
)

factors = st.floats(1, 64)


def stretches(scaler: Scaler, rope: RopeSpec, length: int | None = None) -> list[float]:
    """lambda_i of every pair."""
    scaler.check(rope)
    return (rope.theta / scaler.frequencies(rope, length).inv_freq).tolist()


def by_parts_ramp(d: int, b: float, L: float, fast: float = 32, slow: float = 1, whole: bool = True) -> list[float]:
    ends = [d * math.log(L / (2 * math.pi * rotations)) / (2 * math.log(b)) for rotations in (fast, slow)]
    if whole:
        ends = [math.floor(ends[0]), math.ceil(ends[1])]
    low, high = (min(max(end, 0), d - 1) for end in ends)
    if low == high:
        high += 0.001
    return [min(max((i - low) / (high - low), 0), 1) for i in range(d // 2)]


def yarn_stretch(ramp: list[float], s: float) -> list[float]:
    return [1 / ((1 - r) + r / s) for r in ramp]


def mrrope_stretch(d: int, b: float, L: float, s: float, uniform: bool) -> list[float]:
    low = min(max(math.floor(d * math.log(L / (2 * math.pi * 32)) / (2 * math.log(b))), 0), d - 1)
    high = min(max(math.ceil(d * math.log(L / (2 * math.pi)) / (2 * math.log(b))), 0), d - 1)
    out = []
    for i in range(d // 2):
        if i <= low:
            out.append(1.0)
        elif i >= high:
            out.append(s)
        elif uniform:
            out.append(s ** ((i - low) / (high - low)))
        else:
            out.append(s ** (((i - low) * (i + 1 - low)) / ((high - low) * (high - low + 1))))
    return out


def alpharope_stretch(d: int, b: float, L: float, s: float) -> list[float]:
    d0 = max(int(d * math.log(L / (2 * math.pi)) / math.log(b)), 1)  # d0 = 0 would give 0 / 0; pair 0 does not change
    return [s ** (2 * i / d0) ** (0.6 * math.log(s)) if 2 * i <= d0 else s for i in range(d // 2)]


def yarn_m(s: float) -> float:
    return 0.1 * math.log(s) + 1


Closed = Callable[[int, float, int, float], tuple[list[float], float]]

STATIC: dict[str, tuple[Callable[[float], Scaler], Closed]] = {
    "linear": (lambda s: Linear(factor=s), lambda d, b, L, s: ([s] * (d // 2), 1)),
    "ntk": (
        lambda s: NTK(factor=s),
        lambda d, b, L, s: ([(b * s ** (d / (d - 2)) / b) ** (2 * i / d) for i in range(d // 2)], 1),
    ),
    "ntk-fixed": (
        lambda s: NTKFixed(factor=s),
        lambda d, b, L, s: ([s ** (2 * (i + 1) / d) for i in range(d // 2)], 1),
    ),
    "ntk-mixed": (
        lambda s: NTKMixed(factor=s),
        lambda d, b, L, s: (
            [math.exp(math.log(s) / (d / 2) ** 0.625 * (i + 1) ** 0.625) for i in range(d // 2)],
            1,
        ),
    ),
    "ntk-mixed:b=0.75": (
        lambda s: NTKMixed(factor=s, b=0.75),
        lambda d, b, L, s: ([math.exp(math.log(s) * ((i + 1) / (d / 2)) ** 0.75) for i in range(d // 2)], 1),
    ),
    "ntk-by-parts": (
        lambda s: NTKByParts(factor=s),
        lambda d, b, L, s: (yarn_stretch(by_parts_ramp(d, b, L), s), 1),
    ),
    "yarn": (
        lambda s: YaRN(factor=s),
        lambda d, b, L, s: (yarn_stretch(by_parts_ramp(d, b, L), s), yarn_m(s)),
    ),
    "yarn:truncate=false": (
        lambda s: YaRN(factor=s, truncate=False),
        lambda d, b, L, s: (yarn_stretch(by_parts_ramp(d, b, L, whole=False), s), yarn_m(s)),
    ),
    "yarn:beta_fast=8,beta_slow=2": (
        lambda s: YaRN(factor=s, beta_fast=8, beta_slow=2),
        lambda d, b, L, s: (yarn_stretch(by_parts_ramp(d, b, L, 8, 2), s), yarn_m(s)),
    ),
    "yarn:mscale": (
        lambda s: YaRN(factor=s, mscale=1.0, mscale_all_dim=0.707),
        lambda d, b, L, s: (
            yarn_stretch(by_parts_ramp(d, b, L), s),
            (0.1 * math.log(s) + 1) / (0.0707 * math.log(s) + 1),
        ),
    ),
    "yarn:attention_factor": (
        lambda s: YaRN(factor=s, attention_factor=1.25),
        lambda d, b, L, s: (yarn_stretch(by_parts_ramp(d, b, L), s), 1.25),
    ),
    "mrrope": (
        lambda s: MrRoPE(factor=s),
        lambda d, b, L, s: (mrrope_stretch(d, b, L, s, uniform=False), yarn_m(s)),
    ),
    "mrrope:uniform": (
        lambda s: MrRoPE(factor=s, uniform=True),
        lambda d, b, L, s: (mrrope_stretch(d, b, L, s, uniform=True), yarn_m(s)),
    ),
    "alpharope": (
        lambda s: AlphaRoPE(factor=s),
        lambda d, b, L, s: (alpharope_stretch(d, b, L, s), yarn_m(s)),
    ),
    "llama3": (lambda s: Llama3(factor=s), lambda d, b, L, s: (llama3_stretch(d, b, L, s), 1)),
    "critical-base": (
        lambda s: CriticalBase(length=math.ceil(s * 200_000)),
        lambda d, b, L, s: (
            [
                b ** ((math.log(math.ceil(s * 200_000) / 2 / math.pi) / math.log(L / 2 / math.pi) - 1) * 2 * i / d)
                for i in range(d // 2)
            ],
            1,
        ),
    ),
    "base": (
        lambda s: Base(base=1e5 * s),
        lambda d, b, L, s: ([(1e5 * s / b) ** (2 * i / d) for i in range(d // 2)], 1),
    ),
}


def llama3_stretch(d: int, b: float, L: float, s: float, low: float = 1, high: float = 4) -> list[float]:
    out = []
    for i in range(d // 2):
        wavelength = 2 * math.pi * b ** (2 * i / d)
        if wavelength > L / low:
            out.append(s)
        elif wavelength < L / high:
            out.append(1.0)
        else:
            smooth = (L / wavelength - low) / (high - low)
            out.append(1 / ((1 - smooth) / s + smooth))
    return out


def brute(base: float, dim: int, length: int) -> np.ndarray:
    """f_b(m) for every m < length, with numpy, from the definition."""
    theta = float(base) ** (-2 * np.arange(dim // 2) / dim)
    return np.cos(np.arange(length)[:, None] * theta).sum(1)


def brute_first(base: float, dim: int, length: int) -> int | None:
    bad = np.flatnonzero(brute(base, dim, length) < 0)
    return int(bad[0]) if len(bad) else None
