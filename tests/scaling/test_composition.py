"""Scalers of different facets compose; two scalers of one facet do not."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ropewalk.errors import ConfigError
from ropewalk.scaling import (
    NTK,
    Base,
    Composition,
    CoPE,
    DualChunk,
    DynamicNTK,
    DynamicYaRN,
    Frequencies,
    JetLong,
    Linear,
    LogN,
    LongRoPE,
    ReRoPE,
    Resonance,
    RopeSpec,
    Scaler,
    SelfExtend,
    String,
    Temperature,
    YaRN,
    compose,
    parse,
)
from ropewalk.scaling.rope import Facet

ROPE = RopeSpec(dim=64, base=1e4, trained_length=2048)


def test_the_identity_adds_nothing() -> None:
    for scaler in (YaRN(factor=4), Resonance(), NTK(factor=2) | Resonance(), Scaler()):
        assert Scaler() | scaler == scaler
        assert scaler | Scaler() == scaler


def test_order_does_not_change_the_frequencies() -> None:
    first, second = YaRN(factor=4) | Resonance(), Resonance() | YaRN(factor=4)
    assert torch.equal(first.frequencies(ROPE).inv_freq, second.frequencies(ROPE).inv_freq)
    assert first.frequencies(ROPE).attention_factor == second.frequencies(ROPE).attention_factor != 1


def drawn(scaler: Scaler, length: int | None, n: int = 300) -> dict[str, tuple[list[float], ...]]:
    """Borders and positions of every band for the first n tokens."""
    i = torch.arange(n)
    return {
        band.name: tuple(f(i).tolist() for f in (band.start, band.stop, band.query, band.key))
        for band in scaler.bands(ROPE, length)
    }


def test_order_changes_nothing() -> None:
    parts = (NTK(factor=4), Resonance(), ReRoPE(window=64), LogN())
    at = torch.arange(0, 10_000, 100)
    wanted = (NTK(factor=4) | Resonance()).frequencies(ROPE)
    for order in itertools.permutations(parts):
        scaler = compose(*order)
        assert torch.equal(scaler.frequencies(ROPE).inv_freq, wanted.inv_freq)
        assert drawn(scaler, None) == drawn(ReRoPE(window=64), None)
        assert torch.equal(scaler.logit_factor(at, ROPE), LogN().logit_factor(at, ROPE))
        assert scaler.reach(ROPE) == math.inf


def test_all_three_facets_from_a_spec() -> None:
    scaler = parse("ntk:4|rerope:512|logn")
    scaler.check(ROPE)
    assert scaler == NTK(factor=4) | ReRoPE(window=512) | LogN()
    assert torch.equal(scaler.frequencies(ROPE).inv_freq, NTK(factor=4).frequencies(ROPE).inv_freq)
    assert drawn(scaler, None, 2000) == drawn(ReRoPE(window=512), None, 2000)
    # log n counts from the trained length, not from the reach of the frequencies
    factor = scaler.logit_factor(torch.tensor([2047, 2048, 2048**2 - 1]), ROPE).tolist()
    assert factor == pytest.approx([1, math.log(2049) / math.log(2048), 2])


def test_without_a_map_or_temperature_there_is_no_change() -> None:
    assert drawn(YaRN(factor=4) | Resonance(), 300) == drawn(Scaler(), 300)
    assert (YaRN(factor=4) | ReRoPE(window=64)).logit_factor(torch.arange(9000), ROPE).unique().tolist() == [1]


def test_or_is_associative() -> None:
    a, b, c = Scaler(), CoPE(), Resonance()
    assert (a | b) | c == a | (b | c) == compose(b, c)


@pytest.mark.parametrize(
    ("frequencies", "carried"),
    [
        (YaRN(factor=2), 4096),
        (NTK(factor=1.3), int(1.3 * 2048)),
        (Base(base=1e4), 2048),
        (DynamicNTK(), 2048),  # without a limit, so the map keeps its trained sizes
        (Resonance(), 2048),
        (Scaler(), 2048),
    ],
)
def test_a_map_counts_from_the_reach_of_the_frequencies(frequencies: Scaler, carried: int) -> None:
    scaler = frequencies | DualChunk()
    assert scaler.rope_for_positions(ROPE).trained_length == carried
    c, w = 3 * carried // 4, carried // 8
    same, before, older = scaler.bands(ROPE)
    i = torch.arange(20_000)
    assert torch.equal(same.start(i), i // (c - w) * (c - w))
    assert before.query(i).max() == older.query(i).max() == c


def test_yarn_with_dual_chunk_has_chunks_of_three_quarters_of_yarns_reach() -> None:
    scaler = parse("yarn:2|dual-chunk")
    assert scaler.bands(ROPE)[2].query(torch.tensor([9000])).tolist() == [3 * (2 * 2048) / 4]
    assert drawn(scaler, None, 9000) == drawn(DualChunk(chunk=3072, window=512), None, 9000)


def test_a_map_follows_the_length_in_steps_of_the_frequencies_reach() -> None:
    scaler = NTK(factor=4) | JetLong(near=64)
    far = [scaler.bands(ROPE, length)[1].key(torch.tensor([1000])).item() for length in (8192, 8193, 24577)]
    assert far == [1000, 500, 250]


@pytest.mark.parametrize(
    ("first", "second", "facet"),
    [
        (YaRN(factor=2), Linear(factor=2), "frequencies"),
        (DynamicNTK(), DynamicNTK(), "frequencies"),
        (Resonance(), Resonance(), "wavelength grid"),
        (ReRoPE(window=64), DualChunk(), "positions"),
        (LogN(), Temperature(factor=2), "temperature"),
    ],
)
def test_one_facet_is_set_once(first: Scaler, second: Scaler, facet: str) -> None:
    with pytest.raises(ConfigError, match=f"'{first.name}' and '{second.name}' both set the {facet}; keep one"):
        first | second


def test_a_clash_inside_a_longer_chain_is_found() -> None:
    with pytest.raises(ConfigError, match="'yarn' and 'cope' both set the frequencies"):
        parse("yarn:2|resonance") | CoPE()


def test_resonance_rounds_the_frequencies_of_its_host() -> None:
    host = NTK(factor=4)
    inv_freq = (host | Resonance()).frequencies(ROPE).inv_freq
    assert not torch.equal(inv_freq, host.frequencies(ROPE).inv_freq)
    assert torch.equal(inv_freq, Resonance().on_grid(host.frequencies(ROPE)).inv_freq)
    alone = Resonance().on_grid(Scaler().frequencies(ROPE))
    assert torch.equal(Resonance().frequencies(ROPE).inv_freq, alone.inv_freq)


def test_any_scaler_can_set_the_wavelength_grid() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Halved(Scaler):
        name: ClassVar[str] = "halved"
        facet: ClassVar[Facet] = "wavelength grid"

        def on_grid(self, frequencies: Frequencies) -> Frequencies:
            return Frequencies(frequencies.inv_freq / 2, frequencies.attention_factor)

    host = YaRN(factor=4)
    frequencies = (host | Halved()).frequencies(ROPE)
    assert torch.equal(frequencies.inv_freq, host.frequencies(ROPE).inv_freq / 2)
    assert frequencies.attention_factor == host.temperature()
    assert torch.equal(Halved().frequencies(ROPE).inv_freq, ROPE.theta / 2)


@given(length=st.integers(1, 100_000))
def test_a_composition_passes_the_length_on(length: int) -> None:
    composed = DynamicYaRN() | Resonance()
    host = DynamicYaRN().frequencies(ROPE, length)
    frequencies = composed.frequencies(ROPE, length)
    assert torch.equal(frequencies.inv_freq, Resonance().on_grid(host).inv_freq)
    assert frequencies.attention_factor == host.attention_factor


def test_a_composition_depends_on_the_length_if_a_member_does() -> None:
    assert (DynamicNTK() | Resonance()).depends_on_length
    assert not (NTK(factor=2) | Resonance()).depends_on_length


@pytest.mark.parametrize(
    ("spec", "reach"),
    [
        ("logn", 2048),
        ("resonance|logn", 2048),
        ("yarn:4|resonance", 8192),
        ("logn|yarn:4", 8192),
        ("resonance|dynamic-ntk", math.inf),
        ("rerope:512|logn", math.inf),
        ("ntk:4|rerope:512|logn", math.inf),
        ("self-extend:4,window=512|logn", (2048 - 512) * 4 + 512),
        ("yarn:2|self-extend:4,window=512", (4096 - 512) * 4 + 512),
        ("yarn:2|leaky-rerope:512,k=2.5", (4096 - 512) * 2.5 + 512),
        ("string:600|linear:2", 4096 + 600 - 128),
        ("dynamic-ntk|string:600", math.inf),
    ],
)
def test_reach(spec: str, reach: float) -> None:
    """A map extends the reach of the frequencies; a temperature and a grid extend nothing."""
    assert parse(spec).reach(ROPE) == reach


def test_check_asks_every_member() -> None:
    short = LongRoPE(factor=2, short=(1.0,), long=(2.0,))
    with pytest.raises(ConfigError, match="short has 1 numbers; rotary dimension 64 needs 32"):
        (Resonance() | short).check(ROPE)
    with pytest.raises(ConfigError, match="window 2048 must be below 2048, the length"):
        (LogN() | ReRoPE(window=2048)).check(ROPE)


def test_a_map_is_checked_against_the_reach_of_the_frequencies() -> None:
    (YaRN(factor=2) | ReRoPE(window=4095)).check(ROPE)
    with pytest.raises(ConfigError, match="window 4096 must be below 4096"):
        (YaRN(factor=2) | SelfExtend(group=2, window=4096)).check(ROPE)
    with pytest.raises(ConfigError, match="window 1400 must not exceed the shift 1365"):
        (NTK(factor=2) | String(window=1400)).check(ROPE)


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
    assert YaRN(factor=4, truncate=False).with_factor(8) == YaRN(factor=8, truncate=False)
