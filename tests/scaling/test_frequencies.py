"""Every static frequency method against its closed form, at its ends, and against published numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from closed_forms import STATIC, factors, stretches
from geometries import LLAMA2, LLAMA3, ropes
from hypothesis import assume, given
from hypothesis import strategies as st

from ropewalk.scaling import (
    NTK,
    AlphaRoPE,
    Base,
    BaseBound,
    CriticalBase,
    DynamicNTK,
    DynamicYaRN,
    Linear,
    Llama3,
    LongRoPE,
    MrRoPE,
    NTKByParts,
    NTKFixed,
    NTKMixed,
    RopeSpec,
    Scaler,
    YaRN,
)


@given(rope=ropes, s=factors)
def test_theta_is_the_plain_frequency(rope: RopeSpec, s: float) -> None:
    closed = [rope.base ** (-2 * i / rope.dim) for i in range(rope.dim // 2)]
    assert rope.theta.tolist() == pytest.approx(closed, rel=2e-6)  # float32, as transformers computes it
    inv_freq, m = Scaler().frequencies(rope)
    assert torch.equal(inv_freq, rope.theta)
    assert m == 1
    assert rope.theta.dtype == torch.float64


@pytest.mark.parametrize("name", STATIC)
@given(rope=ropes, s=factors)
def test_closed_form(name: str, rope: RopeSpec, s: float) -> None:
    build, closed = STATIC[name]
    expected, m = closed(rope.dim, rope.base, rope.trained_length, s)
    # Llama 3 depends on the wavelength, which the package has only in float32.
    rel = 1e-4 if name == "llama3" else 1e-9
    assert stretches(build(s), rope) == pytest.approx(expected, rel=rel)
    assert build(s).frequencies(rope).attention_factor == pytest.approx(m, rel=1e-12)


IDENTITIES: list[Callable[[RopeSpec], Scaler]] = [
    lambda rope: Linear(factor=1),
    lambda rope: NTK(factor=1),
    lambda rope: NTKFixed(factor=1),
    lambda rope: NTKMixed(factor=1, b=0.3),
    lambda rope: DynamicNTK(factor=1),
    lambda rope: DynamicNTK(factor=3.7),
    lambda rope: NTKByParts(factor=1),
    lambda rope: YaRN(factor=1),
    lambda rope: YaRN(factor=1, mscale=0.7, mscale_all_dim=1.3, truncate=False),
    lambda rope: DynamicYaRN(),
    lambda rope: Llama3(factor=1),
    lambda rope: LongRoPE(factor=1, short=(1.0,) * (rope.dim // 2), long=(1.0,) * (rope.dim // 2)),
    lambda rope: Base(base=rope.base),
    lambda rope: CriticalBase(length=rope.trained_length),
    lambda rope: MrRoPE(factor=1),
    lambda rope: MrRoPE(factor=1, uniform=True),
    lambda rope: AlphaRoPE(factor=1),
]


@pytest.mark.parametrize(
    "build", IDENTITIES, ids=lambda build: str(build(RopeSpec(dim=8, base=1e4, trained_length=64)))
)
@given(rope=ropes)
def test_factor_one_is_the_model_bit_for_bit(build: Callable[[RopeSpec], Scaler], rope: RopeSpec) -> None:
    for length in (None, 1, rope.trained_length):
        inv_freq, m = build(rope).frequencies(rope, length)
        assert torch.equal(inv_freq, rope.theta)
        assert m == 1


@given(rope=ropes, s=factors)
def test_fastest_pair(rope: RopeSpec, s: float) -> None:
    d = rope.dim
    for scaler in (NTK(factor=s), Base(base=rope.base * s)):
        assert stretches(scaler, rope)[0] == 1
    assert stretches(Linear(factor=s), rope)[0] == pytest.approx(s)
    assert stretches(NTKFixed(factor=s), rope)[0] == pytest.approx(s ** (2 / d))
    if s > 1.01:  # 0^(0.6 ln s) is 0 only away from s = 1
        assert stretches(AlphaRoPE(factor=s), rope)[0] == 1
    for by_parts in (NTKByParts(factor=s), YaRN(factor=s), MrRoPE(factor=s), MrRoPE(factor=s, uniform=True)):
        assert stretches(by_parts, rope)[0] == 1  # low is never below pair 0


@given(rope=ropes, s=factors)
def test_slowest_pair_is_divided_by_the_factor(rope: RopeSpec, s: float) -> None:
    for scaler in (
        Linear(factor=s),
        NTK(factor=s),
        NTKFixed(factor=s),
        NTKMixed(factor=s),
        NTKMixed(factor=s, b=0),
    ):
        assert stretches(scaler, rope)[-1] == pytest.approx(s, rel=1e-9)
    # The others divide by s from the first pair with less than one rotation within L.
    turns_of_slowest = rope.trained_length * rope.base ** (-(rope.dim - 2) / rope.dim) / (2 * math.pi)
    high = math.ceil(rope.dim * math.log(rope.trained_length / (2 * math.pi)) / (2 * math.log(rope.base)))
    assume(turns_of_slowest < 0.99 and high <= rope.dim // 2 - 1)
    for by_parts in (
        NTKByParts(factor=s),
        YaRN(factor=s),
        MrRoPE(factor=s),
        AlphaRoPE(factor=s),
        Llama3(factor=s),
    ):
        assert stretches(by_parts, rope)[-1] == pytest.approx(s, rel=1e-9)


FALLING = [name for name in STATIC if name not in ("base", "critical-base")]


@pytest.mark.parametrize("name", STATIC)
@given(rope=ropes, s=factors)
def test_frequencies_fall_with_the_pair(name: str, rope: RopeSpec, s: float) -> None:
    inv_freq = STATIC[name][0](s).frequencies(rope).inv_freq
    assert torch.isfinite(inv_freq).all()
    # In float32 two neighbours of a wide head can be equal, and differ after the rounding of ln b'.
    assert (inv_freq[1:] <= inv_freq[:-1] * (1 + 1e-12)).all()


# AlphaRoPE is left out: its stretch s^(x^(0.6 ln s)) of a fast pair (x < 1) first grows with s, then falls.
@pytest.mark.parametrize("name", [name for name in FALLING if name != "alpharope"])
@given(rope=ropes, s=factors, more=st.floats(1, 4))
def test_frequencies_fall_with_the_factor(name: str, rope: RopeSpec, s: float, more: float) -> None:
    build = STATIC[name][0]
    slower, m_slower = build(s * more).frequencies(rope)
    faster, m_faster = build(s).frequencies(rope)
    assert (slower <= faster * (1 + 1e-12)).all()
    assert m_slower >= m_faster * (1 - 1e-12)


@given(rope=ropes, s=factors)
def test_stretch_lies_between_one_and_the_factor(rope: RopeSpec, s: float) -> None:
    for name in FALLING:
        inv_freq = STATIC[name][0](s).frequencies(rope).inv_freq
        assert (inv_freq <= rope.theta * (1 + 1e-12)).all(), name
        assert (inv_freq >= rope.theta / s * (1 - 1e-12)).all(), name


# The kexue.fm/archives/9706 family as mixed-radix numbers.


@given(rope=ropes, s=factors, b=st.floats(0, 1))
def test_radices_multiply_to_the_factor_and_fall(rope: RopeSpec, s: float, b: float) -> None:
    stretch = [1.0, *stretches(NTKMixed(factor=s, b=b), rope)]
    radices = [after / before for before, after in pairwise(stretch)]
    assert math.prod(radices) == pytest.approx(s, rel=1e-9)
    assert min(radices) >= 1 - 1e-12
    assert all(first >= second - 1e-9 for first, second in pairwise(radices))


@given(rope=ropes, s=factors)
def test_ntk_mixed_ends_are_ntk_fixed_and_linear(rope: RopeSpec, s: float) -> None:
    for b, end in ((1.0, NTKFixed(factor=s)), (0.0, Linear(factor=s))):
        mixed = NTKMixed(factor=s, b=b).frequencies(rope).inv_freq
        torch.testing.assert_close(mixed, end.frequencies(rope).inv_freq, rtol=1e-12, atol=0)


# Published numbers.


def test_published_bases_of_llama2_at_four_times() -> None:
    assert CriticalBase(length=16384).base(LLAMA2) == pytest.approx(71_738, abs=1)
    d = LLAMA2.dim
    slowest = NTK(factor=4).frequencies(LLAMA2).inv_freq[-1].item()
    assert slowest ** (-d / (d - 2)) == pytest.approx(40_890, abs=1)


def test_base_bound_of_llama2_at_four_times() -> None:
    pytest.importorskip("ropewalk.scaling.base_bound")
    base = BaseBound(length=16384).base(LLAMA2)
    assert base == pytest.approx(2.3164e5, rel=1e-4)  # kexue.fm/archives/10122 has 2.3e5

    def worst(b: float) -> float:
        theta = torch.tensor([b ** (-2 * i / 128) for i in range(64)], dtype=torch.float64)
        return torch.cos(torch.arange(16384, dtype=torch.float64)[:, None] * theta).sum(dim=1).min().item()

    assert worst(base) >= 0
    # Feasible bases are thin islands: a slightly smaller base fails, and so does a much larger one.
    assert worst(base * (1 - 1e-6)) < 0
    assert worst(307_923) < -1


def test_llama31_pairs() -> None:
    # Wavelength 2 pi 5e5^(i/64): below 2048 up to pair 28, above 8192 from pair 35 on.
    stretch = stretches(Llama3(), LLAMA3)
    assert stretch[:29] == [1.0] * 29
    assert stretch[35:] == pytest.approx([8.0] * 29)
    assert all(1 < before < after < 8 for before, after in pairwise(stretch[29:35]))
    wavelength = 2 * math.pi * 5e5 ** (32 / 64)
    smooth = (8192 / wavelength - 1) / 3
    assert stretch[32] == pytest.approx(1 / ((1 - smooth) / 8 + smooth), rel=1e-5)


def test_yarn_pairs_of_llama2() -> None:
    # c(32) = 20.9 and c(1) = 45.03: the ramp runs from pair 20 to pair 46.
    stretch = stretches(YaRN(factor=16), LLAMA2)
    assert stretch[:21] == [1.0] * 21
    assert stretch[46:] == pytest.approx([16.0] * 18)
    assert 1 < stretch[21] < stretch[45] < 16
    assert YaRN(factor=16).frequencies(LLAMA2).attention_factor == pytest.approx(1.2772588722)
