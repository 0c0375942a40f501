"""Temperatures, compared with logarithms by hand."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import pytest
import torch
from geometries import trained_on
from hypothesis import given
from hypothesis import strategies as st

from ropewalk.errors import ConfigError
from ropewalk.scaling import METHODS, InfoScale, LogN, ReRoPE, Scaler, StepLog, Temperature, YaRN, parse

positions = st.lists(st.integers(0, 2**40), max_size=8)
ONE_OF_EACH = [LogN(), LogN(power=0.5), InfoScale(), InfoScale(dim=96), StepLog(), Temperature(factor=1.2)]


def test_every_temperature_is_here() -> None:
    assert {scaler.name for scaler in ONE_OF_EACH} == {
        n for n, method in METHODS.items() if method.facet == "temperature"
    }


def at(scaler: Scaler, trained: int, positions: list[int]) -> list[float]:
    got = scaler.logit_factor(torch.tensor(positions, dtype=torch.int64), trained_on(trained))
    assert got.dtype == torch.float64
    return [float(factor) for factor in got]


@given(trained=st.integers(2, 10**6), at=positions)
def test_logn_is_the_ratio_of_logarithms_and_at_least_one(trained: int, at: list[int]) -> None:
    got = LogN().logit_factor(torch.tensor(at, dtype=torch.int64), trained_on(trained))
    assert got.dtype == torch.float64
    wanted = [math.log(p + 1) / math.log(trained) if p + 1 > trained else 1.0 for p in at]
    assert got.tolist() == pytest.approx(wanted, rel=1e-14)


@given(trained=st.integers(2, 10**6), at_positions=positions, power=st.floats(0.1, 3))
def test_logn_takes_a_power(trained: int, at_positions: list[int], power: float) -> None:
    wanted = [max(1.0, math.log(p + 1, trained)) ** power for p in at_positions]
    assert at(LogN(power=power), trained, at_positions) == pytest.approx(wanted, rel=1e-12)


@given(trained=st.integers(2, 10**6), seen=positions, dim=st.none() | st.integers(1, 512))
def test_infoscale_is_the_ratio_of_roots(trained: int, seen: list[int], dim: int | None) -> None:
    """By exact arithmetic with 60 digits."""
    with localcontext() as context:
        context.prec = 60
        power = Decimal(-2) / (dim or trained_on(trained).dim)

        def rest(n: int) -> Decimal:
            return 1 - (power * Decimal(n).ln()).exp()

        wanted = [max(1.0, float((rest(p + 1) / rest(trained)).sqrt())) for p in seen]
    assert at(InfoScale(dim=dim), trained, seen) == pytest.approx(wanted, rel=1e-12)


def test_infoscale_by_hand() -> None:
    """d = 2: 1 - 1/n, so from 4 keys to 16 the factor is sqrt((15/16) / (3/4))."""
    assert at(InfoScale(dim=2), 4, [0, 3, 15]) == pytest.approx([1, 1, math.sqrt(1.25)])


def test_infoscale_in_many_dimensions_is_the_root_of_logn() -> None:
    seen = [0, 100, 4095, 4096, 20_000, 10**6]
    assert at(InfoScale(dim=2**16), 4096, seen) == pytest.approx(at(LogN(power=0.5), 4096, seen), rel=1e-4)


@given(
    trained=st.integers(1, 10**5), length=st.none() | st.integers(1, 10**5), beta=st.floats(1e-3, 10), seen=positions
)
def test_step_log_grows_in_steps(trained: int, length: int | None, beta: float, seen: list[int]) -> None:
    wanted = [1 + beta * math.log(1 + p // (length or trained)) for p in seen]
    assert at(StepLog(beta=beta, length=length), trained, seen) == pytest.approx(wanted, rel=1e-14)


def test_step_log_by_hand() -> None:
    got = at(StepLog(length=8), 100, [0, 7, 8, 15, 16, 800])
    assert got == pytest.approx([1, 1, 1 + 0.1 * math.log(2), 1 + 0.1 * math.log(2), 1 + 0.1 * math.log(3), 1.461512])


@pytest.mark.parametrize("scaler", ONE_OF_EACH[:-1])
def test_within_the_trained_length_nothing_changes(scaler: Scaler) -> None:
    assert at(scaler, 64, list(range(64))) == [1] * 64
    assert at(scaler, 64, [200])[0] > 1


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


@pytest.mark.parametrize("scaler", ONE_OF_EACH)
def test_any_shape_of_positions(scaler: Scaler) -> None:
    at, rope = torch.arange(60), trained_on(16)
    assert torch.equal(scaler.logit_factor(at.view(3, 4, 5), rope).flatten(), scaler.logit_factor(at, rope))


@pytest.mark.parametrize("scaler", ONE_OF_EACH)
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
        ("logn:0", "logn: power 0 must be above 0"),
        ("logn:nan", "logn: power nan must be above 0"),
        ("logn:power=101", "logn: power 101 must be above 0 and at most 100"),
        ("infoscale:0", "infoscale: dim 0 must be from 1 to 65536"),
        ("infoscale:1" + 400 * "0", "infoscale: dim 1000"),
        ("step-log:0", "step-log: beta 0 must be above 0"),
        ("step-log:inf", "step-log: beta inf must be above 0 and at most 1e6"),
        ("temperature:0", "temperature: factor 0 must be above 0"),
        ("temperature:-1.5", "temperature: factor -1.5 must be above 0"),
        ("temperature:inf", "temperature: factor inf must be above 0"),
        ("temperature:nan", "temperature: factor nan must be above 0"),
    ],
)
def test_impossible_temperatures_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(text)


def test_a_step_needs_a_token() -> None:
    with pytest.raises(ConfigError, match="step-log: length 0 must be at least 1"):
        StepLog(length=0)


@pytest.mark.parametrize("scaler", [LogN(), InfoScale()])
def test_a_logarithm_needs_two_tokens(scaler: Scaler) -> None:
    scaler.check(trained_on(2))
    with pytest.raises(ConfigError, match=f"{scaler.name}: trained length 1 must be at least 2"):
        scaler.check(trained_on(1))
