"""DPRoPE, compared with histograms that are counted one angle at a time."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from example_count import examples
from geometries import SMALL
from hypothesis import given
from hypothesis import strategies as st

from ropewalk.errors import ConfigError
from ropewalk.scaling import DPRoPE, RopeSpec
from ropewalk.scaling.dprope import _distribution

ropes = st.builds(
    RopeSpec,
    dim=st.sampled_from([4, 8]),
    base=st.floats(2, 1e5),
    trained_length=st.integers(2, 300),
)


def shares(theta: float, tokens: int) -> list[float]:
    """The share of each degree among the angles of the first tokens."""
    degrees = Counter(min(359, int(math.fmod(p * theta, 2 * math.pi) * (360 / (2 * math.pi)))) for p in range(tokens))
    return [(degrees[degree] + 2**-14) / tokens for degree in range(360)]


def distances(rope: RopeSpec, s: float, theta: float) -> tuple[float, float]:
    """How far the angles over s L tokens are from those over L, without and with interpolation."""
    trained, longer = shares(theta, rope.trained_length), math.ceil(rope.trained_length * s)

    def distance(scaled: float) -> float:
        return math.fsum(p * math.log(p / q) for p, q in zip(trained, shares(scaled, longer), strict=True))

    return distance(theta), distance(theta / s)


@examples(40)
@given(rope=ropes, s=st.floats(1, 8))
def test_a_pair_takes_the_nearer_distribution(rope: RopeSpec, s: float) -> None:
    got = DPRoPE(factor=s).frequencies(rope)
    assert got.attention_factor == 1
    for theta, new in zip(rope.theta.tolist(), got.inv_freq.tolist(), strict=True):
        kept, divided = distances(rope, s, theta)
        assert new in (theta, theta / s)
        if abs(kept - divided) > 1e-9:
            assert new == (theta if kept < divided else theta / s)


@pytest.mark.parametrize("theta", [1.0, 0.3, 0.007])
def test_shares_of_a_long_text_are_not_rounded(theta: float) -> None:
    pairs = zip(_distribution(theta, 50_000).tolist(), shares(theta, 50_000), strict=True)
    moved = 50_000 * math.fsum(abs(a - b) for a, b in pairs) / 2
    assert moved < 1.5, "an angle at the edge of a degree"


def test_factor_one_is_the_untouched_model() -> None:
    assert torch.equal(DPRoPE(factor=1).frequencies(SMALL).inv_freq, SMALL.theta)


def test_pairs_that_see_a_small_arc_are_interpolated() -> None:
    """Their angles over s L tokens are then those over L; without it they reach s times as far."""
    rope = RopeSpec(dim=32, base=1e6, trained_length=512)
    theta, got = rope.theta, DPRoPE(factor=4).frequencies(rope).inv_freq
    within_a_circle, within_a_degree = theta * 2048 < 2 * math.pi, theta * 2048 < math.radians(1)
    slow = within_a_circle & ~within_a_degree
    assert slow.sum() == 7 and within_a_degree.sum() == 2
    assert torch.equal(got[slow], theta[slow] / 4)
    assert torch.equal(got[within_a_degree], theta[within_a_degree])  # one bin holds all of them


def test_pairs_that_do_not_rotate_stay_so() -> None:
    got = DPRoPE(factor=4).frequencies(RopeSpec(dim=8, base=1e4, trained_length=64, rotating_pairs=2)).inv_freq
    assert (got > 0).tolist() == [True, True, False, False]


def test_more_tokens_than_it_counts_are_refused() -> None:
    rope = RopeSpec(dim=4, base=1e4, trained_length=2**18)
    DPRoPE(factor=4).check(rope)
    with pytest.raises(ConfigError, match=r"dprope: it counts the angles of 4\.1 times 262144 tokens"):
        DPRoPE(factor=4.1).frequencies(rope)
