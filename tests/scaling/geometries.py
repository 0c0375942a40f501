"""Rotary geometries that the tests of scalers share."""

from __future__ import annotations

from hypothesis import strategies as st

from ropewalk.scaling import RopeSpec

LLAMA2 = RopeSpec(dim=128, base=1e4, trained_length=4096)
LLAMA3 = RopeSpec(dim=128, base=5e5, trained_length=8192)
SMALL = RopeSpec(dim=16, base=1e4, trained_length=256)
MODELS = [
    LLAMA2,
    LLAMA3,
    RopeSpec(dim=64, base=1e5, trained_length=2048),
    SMALL,
]

ropes = st.builds(
    RopeSpec,
    dim=st.integers(2, 128).map(lambda n: 2 * n),
    base=st.floats(1, 8).map(lambda n: 10.0**n),
    trained_length=st.integers(16, 200_000),
)


def trained_on(length: int) -> RopeSpec:
    """A geometry with this trained length, for tests in which nothing else matters."""
    return RopeSpec(dim=8, base=1e4, trained_length=length)
