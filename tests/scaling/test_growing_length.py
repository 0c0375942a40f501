"""The steps in which a growing sequence gets new frequencies or positions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ropewalk.errors import ConfigError
from ropewalk.scaling import NTK, DynamicNTK, DynamicYaRN, JetLong, LogN, RopeSpec, Scaler

ROPE = RopeSpec(dim=64, base=1e4, trained_length=2048)


@pytest.mark.parametrize(
    ("scaler", "step"),
    [
        (Scaler(), 256),
        (DynamicNTK(), 256),
        (DynamicNTK(step=100), 100),
        (DynamicYaRN(step=100), 100),
        (JetLong(step=100), 100),
        (JetLong(), 256),
        (DynamicNTK(step=100) | JetLong(step=30), 30),
        (DynamicYaRN(step=30) | JetLong(step=100) | LogN(), 30),
        (DynamicNTK(step=300) | LogN(), 300),
        (NTK(factor=4) | JetLong(), 256),
    ],
)
def test_the_step_of_growing_length(scaler: Scaler, step: int) -> None:
    assert scaler.growing_step(ROPE) == step


def test_a_short_model_grows_by_the_token() -> None:
    assert DynamicNTK().growing_step(RopeSpec(dim=8, base=1e4, trained_length=7)) == 1


@given(trained=st.integers(1, 60), step=st.none() | st.integers(1, 50), position=st.integers(0, 400))
def test_growing_length_is_trained_length_and_whole_steps(trained: int, step: int | None, position: int) -> None:
    rope = RopeSpec(dim=8, base=1e4, trained_length=trained)
    wanted = trained
    while wanted < position + 1:
        wanted += step or max(1, trained // 8)
    for scaler in (DynamicNTK(step=step), DynamicYaRN(step=step), JetLong(step=step), DynamicNTK(step=step) | LogN()):
        assert scaler.growing_length(position, rope) == wanted


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DynamicNTK(step=0), "dynamic-ntk: step 0 must be at least 1"),
        (lambda: DynamicYaRN(step=-4), "dynamic-yarn: step -4 must be at least 1"),
    ],
)
def test_impossible_steps_are_refused(make: Callable[[], Scaler], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
