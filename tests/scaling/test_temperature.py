"""Temperatures, compared with logarithms by hand."""

from __future__ import annotations

import math

import pytest
import torch
from geometries import trained_on
from hypothesis import given
from hypothesis import strategies as st

from ropewalk.errors import ConfigError
from ropewalk.scaling import LogN, ReRoPE, Scaler, Temperature, YaRN, parse

positions = st.lists(st.integers(0, 2**40), max_size=8)


@given(trained=st.integers(2, 10**6), at=positions)
def test_logn_is_the_ratio_of_logarithms_and_at_least_one(trained: int, at: list[int]) -> None:
    got = LogN().logit_factor(torch.tensor(at, dtype=torch.int64), trained_on(trained))
    assert got.dtype == torch.float64
    wanted = [math.log(p + 1) / math.log(trained) if p + 1 > trained else 1.0 for p in at]
    assert got.tolist() == pytest.approx(wanted, rel=1e-14)


def test_logn_at_powers_of_the_trained_length() -> None:
    """Position L - 1 is the L-th token, the last with factor 1; the token L^2 gets 2."""
    at = torch.tensor([0, 1, 14, 15, 16, 16**2 - 1, 16**3 - 1])
    got = LogN().logit_factor(at, trained_on(16))
    assert got[:4].tolist() == [1, 1, 1, 1]
    assert got[4] == pytest.approx(math.log(17) / math.log(16))
    assert got[5:].tolist() == pytest.approx([2, 3])


@given(factor=st.floats(1e-3, 1e3), at=positions)
def test_temperature_is_constant(factor: float, at: list[int]) -> None:
    got = Temperature(factor=factor).logit_factor(torch.tensor(at, dtype=torch.int64), trained_on(16))
    assert got.dtype == torch.float64
    assert got.tolist() == [factor] * len(at)


@pytest.mark.parametrize("scaler", [Scaler(), YaRN(factor=4), ReRoPE(window=4)])
def test_the_other_facets_have_temperature_one(scaler: Scaler) -> None:
    got = scaler.logit_factor(torch.arange(100), trained_on(16))
    assert got.dtype == torch.float64
    assert got.tolist() == [1] * 100


@pytest.mark.parametrize("scaler", [LogN(), Temperature(factor=1.2)])
def test_any_shape_of_positions(scaler: Scaler) -> None:
    at, rope = torch.arange(60), trained_on(16)
    assert torch.equal(scaler.logit_factor(at.view(3, 4, 5), rope).flatten(), scaler.logit_factor(at, rope))


@pytest.mark.parametrize("scaler", [LogN(), Temperature(factor=1.2)])
def test_nothing_else_changes(scaler: Scaler) -> None:
    model = trained_on(16)
    scaler.check(model)
    assert torch.equal(scaler.frequencies(model, 1000).inv_freq, model.theta)
    assert scaler.frequencies(model, 1000).attention_factor == 1
    assert [band.name for band in scaler.bands(model, 1000)] == ["all"]
    assert scaler.reach(model) == 16
    assert not scaler.depends_on_length


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("temperature:0", "temperature: factor 0 must be above 0"),
        ("temperature:-1.5", "temperature: factor -1.5 must be above 0"),
        ("temperature:inf", "temperature: factor inf must be above 0"),
        ("temperature:nan", "temperature: factor nan must be above 0"),
    ],
)
def test_impossible_temperatures_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(text)


def test_logn_needs_a_logarithm() -> None:
    LogN().check(trained_on(2))
    with pytest.raises(ConfigError, match="logn: trained length 1 must be at least 2"):
        LogN().check(trained_on(1))
