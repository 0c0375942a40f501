"""Block-bootstrap intervals: against scipy, against known coverage, and in closed form."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy.signal import lfilter
from scipy.stats import bootstrap, norm
from scipy.stats import t as student

from ropewalk.errors import DataError
from ropewalk.evals.statistics import block_interval, block_means, paired_difference


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


@pytest.mark.parametrize("blocks", [4, 8, 16, 32])
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


def test_constant_losses_have_a_point() -> None:
    assert block_interval(np.full(256, math.log(256))) == pytest.approx((math.log(256),) * 2)


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
