"""Every frequency method against a closed form in plain Python, transformers' own, and published numbers.

Symbols as in the papers: d rotary dimension, b base, L trained length, s factor, i pair index,
lambda_i = theta_i / theta'_i the stretch of pair i, m the factor on cos and sin.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ropewalk.errors import ConfigError
from ropewalk.scaling import (
    METHODS,
    NTK,
    AlphaRoPE,
    Base,
    BaseBound,
    CoPE,
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
    Resonance,
    RopeSpec,
    Scaler,
    YaRN,
)
from ropewalk.scaling.base import critical_dimension

LLAMA2 = RopeSpec(dim=128, base=1e4, trained_length=4096)
LLAMA3 = RopeSpec(dim=128, base=5e5, trained_length=8192)

ropes = st.builds(
    RopeSpec,
    dim=st.integers(2, 128).map(lambda n: 2 * n),
    base=st.floats(1, 8).map(lambda n: 10.0**n),
    trained_length=st.integers(16, 200_000),
)
factors = st.floats(1, 64)


def stretches(scaler: Scaler, rope: RopeSpec, length: int | None = None) -> list[float]:
    """lambda_i of every pair."""
    scaler.check(rope)
    return (rope.theta / scaler.frequencies(rope, length).inv_freq).tolist()


# Closed forms: scalars straight from the papers, nothing taken from the package.


def by_parts_ramp(d: int, b: float, L: float, fast: float = 32, slow: float = 1, whole: bool = True) -> list[float]:
    ends = [d * math.log(L / (2 * math.pi * turns)) / (2 * math.log(b)) for turns in (fast, slow)]
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
    d0 = max(int(d * math.log(L / (2 * math.pi)) / math.log(b)), 1)  # 0 would divide by itself; pair 0 is kept
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
    # Llama 3 chooses by the wavelength, which the package knows to float32 only.
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
def test_factor_one_is_the_model_to_the_bit(build: Callable[[RopeSpec], Scaler], rope: RopeSpec) -> None:
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
    # The others divide by s from the pair on that turns less than once within L.
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
    # In float32 two neighbours of a wide head may be equal, and ln b' rounds them apart.
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
    assert critical_dimension(LLAMA2) == 92  # arXiv 2310.05209 gives 92 for Llama 2


def test_base_bound_of_llama2_at_four_times() -> None:
    pytest.importorskip("ropewalk.scaling.base_bound")
    base = BaseBound(length=16384).base(LLAMA2)
    assert base == pytest.approx(2.3164e5, rel=1e-4)  # kexue.fm/archives/10122 has 2.3e5

    def worst(b: float) -> float:
        theta = torch.tensor([b ** (-2 * i / 128) for i in range(64)], dtype=torch.float64)
        return torch.cos(torch.arange(16384, dtype=torch.float64)[:, None] * theta).sum(dim=1).min().item()

    assert worst(base) >= 0
    # Feasible bases are thin islands: neither a little less nor a good deal more will do.
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


# Dynamic methods.


@given(rope=ropes, s=factors, more=st.floats(1, 50))
def test_dynamic_ntk(rope: RopeSpec, s: float, more: float) -> None:
    length = math.ceil(rope.trained_length * more)
    d, ratio = rope.dim, s * length / rope.trained_length - (s - 1)
    got = DynamicNTK(factor=s).frequencies(rope, length)
    closed = [theta * ratio ** (-2 * i / (d - 2)) for i, theta in enumerate(rope.theta.tolist())]
    assert got.inv_freq.tolist() == pytest.approx(closed, rel=1e-9)
    static = NTK(factor=length / rope.trained_length).frequencies(rope)
    assert torch.equal(DynamicNTK(factor=1).frequencies(rope, length).inv_freq, static.inv_freq)


@given(rope=ropes, more=st.floats(1, 50))
def test_dynamic_yarn_is_yarn_at_the_length(rope: RopeSpec, more: float) -> None:
    length = math.ceil(rope.trained_length * more)
    for truncate in (True, False):
        dynamic = DynamicYaRN(truncate=truncate, beta_fast=16).frequencies(rope, length)
        static = YaRN(factor=length / rope.trained_length, truncate=truncate, beta_fast=16).frequencies(rope)
        assert torch.equal(dynamic.inv_freq, static.inv_freq)
        assert dynamic.attention_factor == static.attention_factor


def test_dynamic_methods_say_so_and_the_others_ignore_the_length() -> None:
    half = LLAMA2.dim // 2
    dynamic = (DynamicNTK(), DynamicYaRN(), LongRoPE(factor=4, short=(1.0,) * half, long=(4.0,) * half))
    assert all(scaler.depends_on_length for scaler in dynamic)
    static = [build(4.0) for build, _ in STATIC.values()]
    for scaler in (*static, LongRoPE(factor=4, short=(2.0,) * half, long=(2.0,) * half), CoPE(), Resonance()):
        assert not scaler.depends_on_length
        assert torch.equal(scaler.frequencies(LLAMA2).inv_freq, scaler.frequencies(LLAMA2, 100_000).inv_freq)


# LongRoPE, CoPE, Resonance.


@settings(max_examples=20)
@given(data=st.data(), rope=ropes, s=factors)
def test_longrope(data: st.DataObject, rope: RopeSpec, s: float) -> None:
    numbers = st.lists(st.floats(0.5, 100), min_size=rope.dim // 2, max_size=rope.dim // 2).map(tuple)
    short, long = data.draw(numbers), data.draw(numbers)
    scaler = LongRoPE(factor=s, short=short, long=long)
    m = math.sqrt(1 + math.log(s) / math.log(rope.trained_length))
    for length, expected in ((None, short), (rope.trained_length, short), (rope.trained_length + 1, long)):
        got = scaler.frequencies(rope, length)
        assert (rope.theta / got.inv_freq).tolist() == pytest.approx(expected, rel=1e-12)
        assert got.attention_factor == pytest.approx(m, rel=1e-12)


def test_longrope_needs_one_number_for_each_pair() -> None:
    with pytest.raises(ConfigError, match="short has 3 numbers; rotary dimension 8 needs 4"):
        LongRoPE(factor=2, short=(1.0,) * 3, long=(1.0,) * 4).check(RopeSpec(dim=8, base=1e4, trained_length=64))


@given(rope=ropes)
def test_cope_tapers_the_pairs_that_never_turned(rope: RopeSpec) -> None:
    theta = rope.theta.tolist()
    slow = [i for i, t in enumerate(theta) if 2 * math.pi / t > rope.trained_length]
    expected = list(theta)
    for k, i in enumerate(slow):
        x = math.pi * k / (len(slow) - 1) if len(slow) > 1 else 0.0
        expected[i] = theta[i] * (1 + math.cos(x)) / 2
    inv_freq, m = CoPE().frequencies(rope)
    assert inv_freq.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-30)
    assert m == 1
    if len(slow) > 1:
        assert inv_freq[-1] == pytest.approx(0, abs=1e-30)
        assert inv_freq[slow[0]] == rope.theta[slow[0]]


def test_cope_spreads_its_taper_over_the_pairs_that_turn() -> None:
    rope = RopeSpec(dim=128, base=1e4, trained_length=4096, rotating_pairs=56)
    slow = [i for i in range(56) if 2 * math.pi * 1e4 ** (2 * i / 128) > 4096]
    assert slow == list(range(46, 56))
    inv_freq = CoPE().frequencies(rope).inv_freq
    taper = [(1 + math.cos(math.pi * k / 9)) / 2 for k in range(10)]
    assert (inv_freq[46:56] / rope.theta[46:56]).tolist() == pytest.approx(taper, abs=1e-12)
    assert inv_freq[55] == pytest.approx(0, abs=1e-30)  # the slowest that turned, not the slowest at rest


@given(rope=ropes, s=factors)
def test_resonance_makes_every_wavelength_whole(rope: RopeSpec, s: float) -> None:
    host = YaRN(factor=s)
    got = (host | Resonance()).frequencies(rope)
    assert got.attention_factor == host.frequencies(rope).attention_factor
    before = 2 * math.pi / host.frequencies(rope).inv_freq
    after = 2 * math.pi / got.inv_freq
    assert after.tolist() == pytest.approx([max(round(w), 1) for w in before.tolist()], rel=1e-12)
    assert ((after - before).abs() <= 0.5 * (1 + 1e-9)).all()


def test_resonance_of_the_fastest_pair() -> None:
    assert Resonance().frequencies(LLAMA2).inv_freq[0].item() == pytest.approx(2 * math.pi / 6)


# Pairs that stand still.


def every_method(rope: RopeSpec) -> list[Scaler]:
    half = rope.dim // 2
    ramp = tuple(1.0 + i for i in range(half))
    static = [build(4.0) for build, _ in STATIC.values()]
    dynamic = [DynamicNTK(), DynamicYaRN(), LongRoPE(factor=4, short=(1.0,) * half, long=ramp)]
    return [Scaler(), *static, *dynamic, CoPE(), Resonance()]


def test_every_frequency_method_is_tested_here() -> None:
    known = {scaler.name for scaler in every_method(LLAMA2)} | {"base-bound"}
    assert known == {name for name, m in METHODS.items() if m.facet in (None, "frequencies", "wavelength grid")}


@settings(max_examples=20)
@given(rope=ropes, rotating=st.integers(0, 128))
def test_pairs_at_rest_stay_at_rest(rope: RopeSpec, rotating: int) -> None:
    assume(rotating <= rope.dim // 2)
    partial = RopeSpec(dim=rope.dim, base=rope.base, trained_length=rope.trained_length, rotating_pairs=rotating)
    for host in every_method(rope):
        scalers = [host] if isinstance(host, Resonance) else [host, host | Resonance()]
        for scaler in scalers:
            for length in (1, 3 * rope.trained_length):
                inv_freq = scaler.frequencies(partial, length).inv_freq
                assert torch.isfinite(inv_freq).all(), str(scaler)
                assert (inv_freq[rotating:] == 0).all(), str(scaler)
                if not isinstance(host, CoPE):  # whose taper is spread over the pairs that turn
                    whole = scaler.frequencies(rope, length).inv_freq
                    assert torch.equal(inv_freq[:rotating], whole[:rotating]), str(scaler)


# Corners of the ramp.


@pytest.mark.parametrize(
    "rope",
    [
        RopeSpec(dim=4, base=1e4, trained_length=128),
        RopeSpec(dim=8, base=1e4, trained_length=100),  # below 2 pi 32: c(32) is negative
        RopeSpec(dim=64, base=1e4, trained_length=5),  # below 2 pi: c(1) is negative too
        RopeSpec(dim=64, base=1e4, trained_length=4),  # where low - high is exactly -1 before clamping
        RopeSpec(dim=64, base=1.5, trained_length=4096),  # c(32) is above d - 1
        RopeSpec(dim=2, base=1e4, trained_length=4096),
        RopeSpec(dim=128, base=1e9, trained_length=1),
    ],
    ids=str,
)
@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize("s", [1.0, 1.5, 64.0])
def test_by_parts_corners_stay_within_one_and_the_factor(rope: RopeSpec, truncate: bool, s: float) -> None:
    for scaler in (
        YaRN(factor=s, truncate=truncate),
        YaRN(factor=s, truncate=truncate, beta_fast=1.001, beta_slow=1),
        MrRoPE(factor=s),
        MrRoPE(factor=s, uniform=True),
        AlphaRoPE(factor=s),
    ):
        stretch = stretches(scaler, rope)
        assert all(1 - 1e-9 <= x <= s + 1e-9 for x in stretch), str(scaler)  # and so finite


def test_a_model_that_turned_through_everything_is_left_alone() -> None:
    rope = RopeSpec(dim=64, base=1.5, trained_length=4096)  # the slowest pair makes 400 turns
    assert stretches(YaRN(factor=8), rope) == [1.0] * 32


def test_a_model_that_turned_through_nothing_is_interpolated() -> None:
    rope = RopeSpec(dim=64, base=1e4, trained_length=5)
    assert stretches(YaRN(factor=8), rope)[1:] == pytest.approx([8.0] * 31)


@pytest.mark.parametrize("scaler", [NTK(factor=2), DynamicNTK()])
def test_ntk_refuses_a_single_pair(scaler: Scaler) -> None:
    with pytest.raises(ConfigError, match="rotary dimension 2 has one pair"):
        scaler.check(RopeSpec(dim=2, base=1e4, trained_length=64))


def test_length_rules_refuse_what_they_cannot_serve() -> None:
    with pytest.raises(ConfigError, match="length 100 is below the trained length 4096"):
        CriticalBase(length=100).check(LLAMA2)
    with pytest.raises(ConfigError, match="trained length 6"):
        CriticalBase(length=100).check(RopeSpec(dim=8, base=1e4, trained_length=6))


def test_reach() -> None:
    assert Scaler().reach(LLAMA2) == CoPE().reach(LLAMA2) == 4096
    assert YaRN(factor=4).reach(LLAMA2) == Linear(factor=4).reach(LLAMA2) == 16384
    assert DynamicNTK().reach(LLAMA2) == DynamicYaRN().reach(LLAMA2) == math.inf
    assert CriticalBase(length=10_000).reach(LLAMA2) == 10_000
    stretched = 1e4 * 4 ** (128 / 126)
    assert Base(base=stretched).reach(LLAMA2) == pytest.approx(NTK(factor=4).reach(LLAMA2), abs=1)
    assert Base(base=100).reach(LLAMA2) == 4096


# transformers' own functions.


def theirs(
    rope_type: str,
    rope: RopeSpec,
    length: int | None = None,
    max_length: int | None = None,
    **parameters: object,
) -> tuple[torch.Tensor, float]:
    config = LlamaConfig(
        hidden_size=rope.dim,
        num_attention_heads=1,
        head_dim=rope.dim,
        max_position_embeddings=max_length or rope.trained_length,
        rope_parameters={"rope_type": rope_type, "rope_theta": rope.base, **parameters},
    )
    inv_freq, m = ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"), seq_len=length)
    return inv_freq.double(), m


def same_as_transformers(
    scaler: Scaler, rope: RopeSpec, expected: tuple[torch.Tensor, float], length: int = 1, rtol: float = 1e-6
) -> None:
    inv_freq, m = scaler.frequencies(rope, length)
    torch.testing.assert_close(inv_freq, expected[0], rtol=rtol, atol=0)
    assert m == pytest.approx(expected[1], rel=1e-12)


MODELS = [
    LLAMA2,
    LLAMA3,
    RopeSpec(dim=64, base=1e5, trained_length=2048),
    RopeSpec(dim=16, base=1e4, trained_length=256),
]
FACTORS = [1.0, 1.7, 4.0, 40.0]
over_models = pytest.mark.parametrize("rope", MODELS, ids=str)
over_factors = pytest.mark.parametrize("s", FACTORS)


@over_models
@over_factors
def test_transformers_linear(rope: RopeSpec, s: float) -> None:
    same_as_transformers(Linear(factor=s), rope, theirs("linear", rope, factor=s))


@over_models
@over_factors
@pytest.mark.parametrize("stretch", [0.5, 1, 1.5, 16])
def test_transformers_dynamic(rope: RopeSpec, s: float, stretch: float) -> None:
    length = int(rope.trained_length * stretch)
    same_as_transformers(DynamicNTK(factor=s), rope, theirs("dynamic", rope, length, factor=s), length)


@over_models
@over_factors
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"truncate": False},
        {"attention_factor": 1.3},
        {"mscale": 1.0, "mscale_all_dim": 1.0},
        {"mscale": 0.707, "mscale_all_dim": 1.2},
        {"beta_fast": 16.0, "beta_slow": 2.5},
        {"beta_fast": 64.0, "beta_slow": 0.5, "truncate": False},
    ],
    ids=str,
)
def test_transformers_yarn(rope: RopeSpec, s: float, fields: dict[str, float]) -> None:
    expected = theirs("yarn", rope, factor=s, original_max_position_embeddings=rope.trained_length, **fields)
    # transformers' ramp is float32: where 1 - r is small, its rounding weighs s times as much.
    same_as_transformers(YaRN(factor=s, **fields), rope, expected, rtol=1e-6 + s * 2.0**-23)


@over_models
@over_factors
def test_transformers_longrope(rope: RopeSpec, s: float) -> None:
    half, L = rope.dim // 2, rope.trained_length
    short, long = [1 + i / half for i in range(half)], [1 + s * i / half for i in range(half)]
    given_m = {"attention_factor": 1.1}
    for fields in ({}, given_m):
        scaler = LongRoPE(factor=s, short=tuple(short), long=tuple(long), **fields)
        for length in (1, L, L + 1, 5 * L):
            expected = theirs(
                "longrope",
                rope,
                length,
                factor=s,
                short_factor=short,
                long_factor=long,
                original_max_position_embeddings=L,
                **fields,
            )
            same_as_transformers(scaler, rope, expected, length)


@over_models
@over_factors
@pytest.mark.parametrize("ends", [(1.0, 4.0), (0.5, 16.0)])
def test_transformers_llama3(rope: RopeSpec, s: float, ends: tuple[float, float]) -> None:
    expected = theirs(
        "llama3",
        rope,
        max_length=8 * rope.trained_length,
        factor=s,
        low_freq_factor=ends[0],
        high_freq_factor=ends[1],
        original_max_position_embeddings=rope.trained_length,
    )
    same_as_transformers(Llama3(factor=s, low_freq_factor=ends[0], high_freq_factor=ends[1]), rope, expected)


@over_models
@over_factors
@pytest.mark.parametrize("share", [1.0, 0.5, 0.25])
def test_transformers_proportional(rope: RopeSpec, s: float, share: float) -> None:
    pairs = int(share * rope.dim / 2)
    partial = RopeSpec(dim=rope.dim, base=rope.base, trained_length=rope.trained_length, rotating_pairs=pairs)
    same_as_transformers(Linear(factor=s), partial, theirs("proportional", rope, factor=s, partial_rotary_factor=share))
