"""Geometries that no model can have are refused."""

from __future__ import annotations

import math

import pytest

from ropewalk.errors import ConfigError
from ropewalk.scaling import RopeSpec


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
