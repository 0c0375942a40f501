"""Block-bootstrap intervals: against scipy, against known coverage, and in closed form."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.signal import lfilter
from scipy.stats import bootstrap, multinomial, norm
from scipy.stats import t as student

from ropewalk.errors import DataError
from ropewalk.evals.statistics import block_interval, block_means, paired_difference, paired_score_interval


def ar1(rng: np.random.Generator, rho: float, shape: tuple[int, ...]) -> np.ndarray:
    """Stationary AR(1) noise of unit variance along the last axis."""
    noise = rng.normal(size=shape) * math.sqrt(1 - rho**2)
    noise[..., 0] /= math.sqrt(1 - rho**2)
    return np.asarray(lfilter([1.0], [1.0, -rho], noise, axis=-1))


def widened(interval: Any, means: np.ndarray) -> tuple[float, float]:
    """Percentiles as far from the mean as Student's interval is wider than the normal one of the sample's variance."""
    n, mean = len(means), means.mean()
    ratio = student.ppf(0.975, n - 1) * means.std(ddof=1) / (norm.ppf(0.975) * means.std())
    return mean + ratio * (interval.low - mean), mean + ratio * (interval.high - mean)


@pytest.mark.parametrize("tokens", [128, 1024, 3200])
def test_is_scipys_on_block_means_and_wider(tokens: int) -> None:
    losses = np.random.default_rng(3).gamma(2.0, 1.0, tokens).astype(np.float32)
    means = losses.astype(np.float64).reshape(-1, 32).mean(axis=1)
    expected = bootstrap((means,), np.mean, method="percentile", rng=np.random.default_rng(5)).confidence_interval
    assert block_interval(losses, seed=5) == pytest.approx(widened(expected, means), rel=1e-12)


def test_large_texts_are_resampled_in_parts_with_the_same_result() -> None:
    losses = np.random.default_rng(3).gamma(2.0, 1.0, 32 * 450)  # 9999 x 450 values are more than one part
    means = losses.reshape(-1, 32).mean(axis=1)
    expected = bootstrap((means,), np.mean, method="percentile", rng=np.random.default_rng(0)).confidence_interval
    np.testing.assert_allclose(block_interval(losses), widened(expected, means), rtol=1e-12)


@pytest.mark.parametrize("blocks", [4, 16])
def test_coverage_of_few_blocks(blocks: int) -> None:
    draws = np.random.default_rng(4).normal(size=(500, blocks))
    held = [low <= 0 <= high for low, high in (block_interval(x, block=1) for x in draws)]
    assert 0.92 <= np.mean(held) <= 0.98


def test_coverage_under_correlation() -> None:
    """The interval over blocks holds the true mean about as often as it says; one over single tokens does not."""
    draws = ar1(np.random.default_rng(11), 0.6, (150, 768))
    held = [low <= 0 <= high for low, high in (block_interval(x) for x in draws)]
    assert 0.88 <= np.mean(held) <= 0.98
    single = [low <= 0 <= high for low, high in (block_interval(x, block=1) for x in draws[:40])]
    assert np.mean(single) < 0.80


def test_same_losses_same_interval() -> None:
    losses = np.random.default_rng(0).normal(size=512)
    assert block_interval(losses) == block_interval(losses.copy())
    assert block_interval(losses, seed=1) != block_interval(losses)


def test_wider_confidence_is_wider() -> None:
    losses = np.random.default_rng(0).normal(size=512)
    (low, high), (lower, higher) = block_interval(losses), block_interval(losses, confidence=0.99)
    assert lower < low < losses.mean() < high < higher


@pytest.mark.filterwarnings("error")
def test_constant_losses_have_a_point() -> None:
    assert block_interval(np.full(256, math.log(256))) == pytest.approx((math.log(256),) * 2)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("lost", [math.nan, math.inf])
def test_losses_that_are_not_finite_have_no_interval(lost: float) -> None:
    assert all(map(math.isnan, block_interval(np.array([lost, *np.ones(255)]))))


def test_too_few_tokens_have_no_interval() -> None:
    assert all(math.isnan(bound) for bound in block_interval(np.ones(127)))
    assert not any(math.isnan(bound) for bound in block_interval(np.ones(128)))


def test_every_token_is_in_a_block() -> None:
    means = block_means(np.arange(100.0), block=32)  # 34 + 33 + 33
    np.testing.assert_allclose(means, [16.5, 50.0, 83.0])


def test_pairing_removes_what_is_common() -> None:
    rng = np.random.default_rng(1)
    hard = rng.gamma(1.0, 3.0, 1024)
    a, b = hard + 0.1 + rng.normal(0, 0.02, 1024), hard
    mean, low, high = paired_difference(a, b)
    assert mean == pytest.approx(float((a - b).mean()))
    assert 0.09 < low < mean < high < 0.11
    plain_low, plain_high = block_interval(a)
    assert high - low < 0.05 * (plain_high - plain_low)


def test_pairing_is_antisymmetric_and_zero_on_itself() -> None:
    a, b = np.random.default_rng(2).normal(size=(2, 512))
    assert paired_difference(a, a) == (0.0, 0.0, 0.0)
    assert paired_difference(a, b)[0] == -paired_difference(b, a)[0]


def test_unequal_lengths_are_refused() -> None:
    with pytest.raises(DataError, match="512 and 256 tokens"):
        paired_difference(np.ones(512), np.ones(256))


def test_paired_interval_is_scipys_over_paired_blocks() -> None:
    rng = np.random.default_rng(8)
    a, b = rng.gamma(2.0, 1.0, (2, 640))
    blocks = [x.reshape(-1, 32).mean(axis=1) for x in (a, b)]
    expected = bootstrap(
        blocks,
        lambda x, y, axis: x.mean(axis=axis) - y.mean(axis=axis),
        paired=True,
        vectorized=True,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    assert paired_difference(a, b)[1:] == pytest.approx(widened(expected, blocks[0] - blocks[1]), abs=1e-12)


def scored(only_a: int, only_b: int, trials: int) -> tuple[float, float]:
    rest = [1] * (trials - only_a - only_b)
    return paired_score_interval([1] * only_a + [0] * only_b + rest, [0] * only_a + [1] * only_b + rest)


def score_test(only_a: int, only_b: int, trials: int, difference: float) -> float:
    """Tango's statistic with continuity correction, the nuisance found by maximizing the likelihood."""

    def unlikelihood(share: float) -> float:
        counts = {share + difference: only_a, share: only_b, 1 - difference - 2 * share: trials - only_a - only_b}
        return -sum(count * math.log(max(chance, 1e-300)) for chance, count in counts.items() if count)

    bounds = (max(0, -difference), (1 - difference) / 2)
    share = minimize_scalar(unlikelihood, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x
    variance = trials * (2 * share + difference - difference**2)
    return max(abs(only_a - only_b - trials * difference) - 1, 0) / math.sqrt(variance)


@pytest.mark.parametrize(("only_a", "only_b", "trials"), [(6, 1, 20), (1, 7, 21), (4, 0, 4), (12, 2, 50), (9, 30, 400)])
def test_the_bounds_of_a_paired_interval_are_where_the_score_test_begins_to_reject(
    only_a: int, only_b: int, trials: int
) -> None:
    low, high = scored(only_a, only_b, trials)
    inside = [bound for bound in (low, high) if abs(bound) < 1]
    statistics = [score_test(only_a, only_b, trials, bound) for bound in inside]
    assert statistics == pytest.approx([norm.ppf(0.975)] * len(inside), abs=1e-4)
    assert low < (only_a - only_b) / trials < high or high == 1


def test_paired_intervals_are_wider_than_published_ones_without_the_correction() -> None:
    """Airway hyper-responsiveness of 21 children (Bentur): Fagerland et al., Statistics in Medicine 33, 2014."""
    low, high = scored(1, 7, 21)
    assert -0.517 - 2 / 21 < low < -0.517
    assert -0.026 < high < -0.026 + 2 / 21


@pytest.mark.parametrize("trials", [3, 5, 12])
def test_paired_intervals_hold_the_difference_whatever_the_chances(trials: int) -> None:
    """Summed over every outcome."""
    outcomes = [(a, b, trials - a - b) for a in range(trials + 1) for b in range(trials + 1 - a)]
    intervals = np.array([scored(a, b, trials) for a, b, _ in outcomes])
    for a in np.linspace(0, 1, 6):
        for b in np.linspace(0, 1 - a, 6):
            chances = multinomial.pmf(outcomes, trials, [a, b, max(1 - a - b, 0)])
            held = (intervals[:, 0] <= a - b + 1e-9) & (a - b - 1e-9 <= intervals[:, 1])
            assert chances[held].sum() > 0.95


def test_few_trials_tell_nothing_apart_and_agreement_has_a_width() -> None:
    assert scored(4, 0, 4)[0] < 0 < scored(7, 0, 7)[0]
    low, high = scored(0, 0, 20)
    assert low == -high < 0
    assert scored(3, 9, 40) == pytest.approx([-bound for bound in scored(9, 3, 40)[::-1]])


def test_paired_fractions_have_a_width_and_cover() -> None:
    low, high = paired_score_interval([0.75] * 20, [0.5] * 20)
    assert low < 0.25 < high
    assert all(map(math.isnan, paired_score_interval([0.5] * 3, [0.25] * 3)))
    rng, parts, held = np.random.default_rng(3), [0, 0.25, 0.5, 1], 0
    for a, b in zip(rng.choice(parts, (1000, 10)), rng.choice(parts, (1000, 10), p=[0.4, 0.3, 0.2, 0.1]), strict=True):
        low, high = paired_score_interval(a, b)
        held += low <= 0.4375 - 0.275 <= high
    assert 0.93 < held / 1000 < 0.995


def test_infinite_losses_of_both_have_no_difference_and_no_warning():
    with np.errstate(invalid="raise"):
        assert np.isnan(paired_difference(np.full(200, np.inf), np.full(200, np.inf))).all()
