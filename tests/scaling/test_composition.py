"""Scalers of different facets act together; scalers of one facet do not."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ropewalk.errors import ConfigError
from ropewalk.scaling import (
    NTK,
    Composition,
    CoPE,
    DynamicNTK,
    DynamicYaRN,
    Linear,
    LongRoPE,
    Resonance,
    RopeSpec,
    Scaler,
    YaRN,
    compose,
    parse,
)

ROPE = RopeSpec(dim=64, base=1e4, trained_length=2048)


def test_the_identity_adds_nothing() -> None:
    for scaler in (YaRN(factor=4), Resonance(), NTK(factor=2) | Resonance(), Scaler()):
        assert Scaler() | scaler == scaler
        assert scaler | Scaler() == scaler


def test_order_does_not_change_the_frequencies() -> None:
    one, other = YaRN(factor=4) | Resonance(), Resonance() | YaRN(factor=4)
    assert torch.equal(one.frequencies(ROPE).inv_freq, other.frequencies(ROPE).inv_freq)
    assert one.frequencies(ROPE).attention_factor == other.frequencies(ROPE).attention_factor != 1


def test_or_is_associative() -> None:
    a, b, c = Scaler(), CoPE(), Resonance()
    assert (a | b) | c == a | (b | c) == compose(b, c)


@pytest.mark.parametrize(
    ("one", "other", "facet"),
    [
        (YaRN(factor=2), Linear(factor=2), "frequencies"),
        (DynamicNTK(), DynamicNTK(), "frequencies"),
        (Resonance(), Resonance(), "wavelength grid"),
    ],
)
def test_one_facet_is_set_once(one: Scaler, other: Scaler, facet: str) -> None:
    with pytest.raises(ConfigError, match=f"'{one.name}' and '{other.name}' both set the {facet}; keep one"):
        one | other


def test_a_clash_inside_a_longer_chain_is_found() -> None:
    with pytest.raises(ConfigError, match="'yarn' and 'cope' both set the frequencies"):
        parse("yarn:2|resonance") | CoPE()


def test_resonance_is_laid_over_its_host() -> None:
    host = NTK(factor=4)
    got = (host | Resonance()).frequencies(ROPE).inv_freq
    assert not torch.equal(got, host.frequencies(ROPE).inv_freq)
    assert torch.equal(got, Resonance().lay_over(host.frequencies(ROPE)).inv_freq)
    alone = Resonance().lay_over(Scaler().frequencies(ROPE))
    assert torch.equal(Resonance().frequencies(ROPE).inv_freq, alone.inv_freq)


@given(length=st.integers(1, 100_000))
def test_a_composition_passes_the_length_on(length: int) -> None:
    composed = DynamicYaRN() | Resonance()
    host = DynamicYaRN().frequencies(ROPE, length)
    got = composed.frequencies(ROPE, length)
    assert torch.equal(got.inv_freq, Resonance().lay_over(host).inv_freq)
    assert got.attention_factor == host.attention_factor


def test_a_composition_depends_on_the_length_if_a_member_does() -> None:
    assert (DynamicNTK() | Resonance()).depends_on_length
    assert not (NTK(factor=2) | Resonance()).depends_on_length


def test_reach_is_the_furthest_of_the_members() -> None:
    assert (YaRN(factor=4) | Resonance()).reach(ROPE) == 8192
    assert (Resonance() | DynamicNTK()).reach(ROPE) == math.inf


def test_check_asks_every_member() -> None:
    short = LongRoPE(factor=2, short=(1.0,), long=(2.0,))
    with pytest.raises(ConfigError, match="short has 1 numbers; rotary dimension 64 needs 32"):
        (Resonance() | short).check(ROPE)


def test_members_and_parts() -> None:
    composed = YaRN(factor=4) | Resonance()
    assert isinstance(composed, Composition)
    assert composed.parts == (YaRN(factor=4), Resonance())
    assert composed.member("frequencies") == YaRN(factor=4)
    assert composed.member("wavelength grid") == Resonance()
    assert composed.member("temperature") is None


def test_scalers_are_values() -> None:
    assert YaRN(factor=4) == YaRN(factor=4.0)
    assert len({YaRN(factor=4), YaRN(factor=4), YaRN(factor=2), NTK(factor=4)}) == 3
    with pytest.raises(AttributeError):
        YaRN(factor=4).factor = 8  # type: ignore[misc]
    assert YaRN(factor=4, truncate=False).at(8) == YaRN(factor=8, truncate=False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dim": 7}, "rotary dimension 7 must be even"),
        ({"dim": 0}, "rotary dimension 0 must be even and at least 2"),
        ({"base": 1.0}, "rotary base 1.0 must be above 1"),
        ({"base": math.nan}, "rotary base nan must be above 1"),
        ({"trained_length": 0}, "trained length 0 must be at least 1"),
        ({"rotating_pairs": 33}, "rotating_pairs 33 must be in 0..32"),
    ],
)
def test_impossible_geometries_are_refused(fields: dict[str, float], message: str) -> None:
    good = {"dim": 64, "base": 1e4, "trained_length": 2048}
    with pytest.raises(ConfigError, match=message):
        RopeSpec(**{**good, **fields})
