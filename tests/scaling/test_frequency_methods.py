"""Frequency methods beyond their closed forms: length, tapers, whole wavelengths, pairs without rotation, reach."""

from __future__ import annotations

import math

import pytest
import torch
from closed_forms import STATIC, factors, stretches
from example_count import examples
from geometries import LLAMA2, ropes
from hypothesis import assume, given
from hypothesis import strategies as st

from ropewalk.errors import ConfigError
from ropewalk.scaling import (
    METHODS,
    NTK,
    AlphaRoPE,
    Base,
    CoPE,
    CriticalBase,
    DynamicNTK,
    DynamicYaRN,
    Linear,
    LongRoPE,
    MrRoPE,
    Resonance,
    RopeSpec,
    Scaler,
    YaRN,
    parse,
)

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


@examples(20)
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
def test_cope_tapers_the_pairs_without_a_full_rotation(rope: RopeSpec) -> None:
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


def test_cope_spreads_its_taper_over_the_pairs_that_rotate() -> None:
    rope = RopeSpec(dim=128, base=1e4, trained_length=4096, rotating_pairs=56)
    slow = [i for i in range(56) if 2 * math.pi * 1e4 ** (2 * i / 128) > 4096]
    assert slow == list(range(46, 56))
    inv_freq = CoPE().frequencies(rope).inv_freq
    taper = [(1 + math.cos(math.pi * k / 9)) / 2 for k in range(10)]
    assert (inv_freq[46:56] / rope.theta[46:56]).tolist() == pytest.approx(taper, abs=1e-12)
    assert inv_freq[55] == pytest.approx(0, abs=1e-30)  # the slowest pair that rotates


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


# Pairs that do not rotate.


def every_method(rope: RopeSpec) -> list[Scaler]:
    half = rope.dim // 2
    ramp = tuple(1.0 + i for i in range(half))
    static = [build(4.0) for build, _ in STATIC.values()]
    dynamic = [DynamicNTK(), DynamicYaRN(), LongRoPE(factor=4, short=(1.0,) * half, long=ramp)]
    return [Scaler(), *static, *dynamic, CoPE(), Resonance()]


def test_every_frequency_method_is_tested_here() -> None:
    known = {scaler.name for scaler in every_method(LLAMA2)} | {"base-bound", "dprope"}  # they have files of their own
    assert known == {name for name, m in METHODS.items() if m.facet in (None, "frequencies", "wavelength grid")}


@examples(20)
@given(rope=ropes, rotating=st.integers(0, 128))
def test_pairs_that_do_not_rotate_stay_so(rope: RopeSpec, rotating: int) -> None:
    assume(rotating <= rope.dim // 2)
    partial = RopeSpec(dim=rope.dim, base=rope.base, trained_length=rope.trained_length, rotating_pairs=rotating)
    for host in every_method(rope):
        scalers = [host] if isinstance(host, Resonance) else [host, host | Resonance()]
        for scaler in scalers:
            for length in (1, 3 * rope.trained_length):
                inv_freq = scaler.frequencies(partial, length).inv_freq
                assert torch.isfinite(inv_freq).all(), str(scaler)
                assert (inv_freq[rotating:] == 0).all(), str(scaler)
                if not isinstance(host, CoPE):  # its taper is spread over the pairs that rotate
                    whole = scaler.frequencies(rope, length).inv_freq
                    assert torch.equal(inv_freq[:rotating], whole[:rotating]), str(scaler)


# Corners of the ramp.


@pytest.mark.parametrize(
    "rope",
    [
        RopeSpec(dim=4, base=1e4, trained_length=128),
        RopeSpec(dim=8, base=1e4, trained_length=100),  # below 2 pi 32: c(32) is negative
        RopeSpec(dim=64, base=1e4, trained_length=5),  # below 2 pi: c(1) is negative too
        RopeSpec(dim=64, base=1e4, trained_length=4),  # low - high is exactly -1 before clamping
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


def test_a_model_whose_pairs_all_completed_many_rotations_does_not_change() -> None:
    rope = RopeSpec(dim=64, base=1.5, trained_length=4096)  # the slowest pair completes 400 rotations
    assert stretches(YaRN(factor=8), rope) == [1.0] * 32


def test_a_model_whose_pairs_completed_no_rotation_is_interpolated() -> None:
    rope = RopeSpec(dim=64, base=1e4, trained_length=5)
    assert stretches(YaRN(factor=8), rope)[1:] == pytest.approx([8.0] * 31)


@pytest.mark.parametrize("scaler", [NTK(factor=2), DynamicNTK()])
def test_ntk_refuses_a_single_pair(scaler: Scaler) -> None:
    with pytest.raises(ConfigError, match="rotary dimension 2 has one pair"):
        scaler.check(RopeSpec(dim=2, base=1e4, trained_length=64))


def test_length_rules_refuse_lengths_below_the_trained_one() -> None:
    with pytest.raises(ConfigError, match="below the trained length 4096; take at least the trained length"):
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


@pytest.mark.parametrize("factor", [1.0, 3.0, 1e9, 2.0**53, 1e18, 2.0**63])
def test_dynamic_ntk_is_the_untouched_model_within_l_at_every_factor(factor: float) -> None:
    assert torch.equal(DynamicNTK(factor=factor).frequencies(LLAMA2, 4096).inv_freq, LLAMA2.theta)


@pytest.mark.parametrize("spec", ["yarn:1e18|dual-chunk", "linear:9e18|string", "base:1e300|jet-long:1k"])
def test_maps_over_a_reach_beyond_int64_have_positions(spec: str) -> None:
    scaler, i = parse(spec), torch.tensor([0, 5000])
    scaler.check(LLAMA2)
    for band in scaler.bands(LLAMA2, 10_000):
        assert bool(band.query(i).isfinite().all()) and bool(band.key(i).isfinite().all())
        assert bool((band.start(i) >= 0).all()) and bool((band.stop(i) <= i + 1).all())


def test_the_rule_of_longrope_needs_two_tokens() -> None:
    rope, lists = RopeSpec(dim=4, base=1e4, trained_length=1), {"short": (1.0, 1.0), "long": (2.0, 2.0)}
    with pytest.raises(ConfigError, match=r"needs a trained length of at least 2; give attention_factor"):
        LongRoPE(factor=4, **lists).check(rope)
    LongRoPE(factor=4, **lists, attention_factor=1.0).check(rope)
