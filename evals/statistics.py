"""Confidence intervals of mean losses, of mean scores, and of paired differences of both.

Losses of neighbouring tokens are correlated, so they are resampled in blocks. Scores of trials are
independent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.stats import binomtest, bootstrap, norm, t

from ..errors import DataError

Losses = np.ndarray[Any, np.dtype[Any]]

LEAST_BLOCKS = 4
"""With fewer blocks the interval is NaN: a bootstrap of two or three numbers is meaningless."""

_VALUES_AT_ONCE = 2**22
Z = float(norm.ppf(0.975))
"""95 % of a normal distribution lie so many standard deviations around its mean."""


def block_means(losses: Losses, block: int = 32) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Means of blocks of about `block` consecutive tokens, [tokens // block].

    The remaining tokens are spread over the blocks, so that every token counts. The sizes of the
    blocks differ by at most one once there are `block` blocks.
    """
    values = np.asarray(losses, dtype=np.float64).ravel()
    count = max(len(values) // block, 1)
    return np.array([part.mean() for part in np.array_split(values, count)])


def block_interval(losses: Losses, block: int = 32, confidence: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Bootstrap interval of the mean of `losses`, by resampling blocks of consecutive tokens.

    Losses of neighbouring tokens are correlated, so an interval that resamples single tokens would
    be too narrow. The percentiles of few blocks lie too close to the mean. They are therefore moved
    away from it by the ratio of Student's interval to the interval of a normal distribution with
    the variance of the sample (Hesterberg, The American Statistician 69, 2015). Equal losses and an
    equal seed give the same interval, bit for bit.

    Args:
        losses: nats per token, [tokens], in the order of the text.
        block: tokens per block. It should be longer than the correlation of the losses.
        confidence: the probability that the interval contains the true mean.
        seed: seed of the resampling.

    Returns:
        Lower and upper bound in nats per token. Both are NaN with fewer than `LEAST_BLOCKS` blocks,
        and where a loss is not finite.
    """
    means = block_means(losses, block)
    count = len(means)
    if count < LEAST_BLOCKS or not np.isfinite(means).all():
        return math.nan, math.nan
    if (means == means[0]).all():  # scipy warns of these
        return float(means[0]), float(means[0])
    interval = bootstrap(
        (means,),
        np.mean,
        vectorized=True,
        confidence_level=confidence,
        method="percentile",
        batch=max(_VALUES_AT_ONCE // count, 1),
        rng=np.random.default_rng(seed),
    ).confidence_interval
    upper = (1 + confidence) / 2
    wider = math.sqrt(count / (count - 1)) * t.ppf(upper, count - 1) / norm.ppf(upper)
    centre = means.mean()
    return float(centre + wider * (interval.low - centre)), float(centre + wider * (interval.high - centre))


def paired_difference(a: Losses, b: Losses, block: int = 32) -> tuple[float, float, float]:
    """Mean of `a - b` over the same tokens, with its 95% interval.

    What makes a token hard for both models cancels in the difference. The interval is therefore far
    narrower than the difference of two separate intervals.

    Args:
        a: nats per token, [tokens].
        b: nats of the same tokens, [tokens].
        block: as in `block_interval`.

    Returns:
        (mean, low, high) in nats per token. The bounds are NaN with fewer than `LEAST_BLOCKS`
        blocks.

    Raises:
        DataError: `a` and `b` have different numbers of tokens.
    """
    if np.shape(a) != np.shape(b):
        raise DataError(f"losses of {np.size(a)} and {np.size(b)} tokens cannot be paired; they must score the same")
    with np.errstate(invalid="ignore"):  # the difference of two infinite losses is NaN
        difference = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    return float(difference.mean()), *block_interval(difference, block)


def wilson_interval(right: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of the share `right / trials` of independent trials (Wilson, JASA 22,
    1927).

    Unlike the normal approximation it stays within 0 and 1, and its width is not zero at 0 % and
    100 %.
    """
    interval = binomtest(right, trials).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def score_interval(scores: Sequence[float], confidence: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Interval of the mean score of independent trials.

    It is Wilson's interval if every score is 0 or 1, and a percentile bootstrap otherwise.

    Args:
        scores: 0 to 1, [trials].
        confidence: the probability that the interval contains the true mean.
        seed: seed of the resampling. Equal scores and an equal seed give the same interval, bit for
            bit.

    Returns:
        Lower and upper bound. Both are NaN for fractions that are all equal, or fewer than
        `LEAST_BLOCKS`: a bootstrap needs several different values.
    """
    if {*scores} <= {0, 1}:
        return wilson_interval(round(sum(scores)), len(scores), confidence)
    if len({*scores}) == 1:
        return math.nan, math.nan
    low, high = block_interval(np.array(scores), 1, confidence, seed)
    return max(low, 0.0), min(high, 1.0)


def mean_score_interval(groups: Sequence[Sequence[float]]) -> tuple[float, float]:
    """95% interval of the mean over `groups` of their mean scores.

    It is Wilson's interval with an effective number of trials: the number of trials with one common
    share whose mean would have the same variance (as for stratified surveys: Korn and Graubard,
    Survey Methodology 24, 1998). The variance of each group is computed with half a right and half
    a wrong answer added. Otherwise a task whose few trials are all right would count as certain, as
    it does in a bootstrap. In simulations with 11 tasks of 2 to 20 trials, the interval contains
    the true mean in 94% to 99% of cases.

    Args:
        groups: scores of independent trials, 0 to 1; one group per task.
    """
    if len(groups) == 1:
        return score_interval(groups[0])
    return _wilson(float(np.mean([np.mean(group) for group in groups])), _effective_trials(groups))


def paired_score_interval(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """95% interval of the mean of `a - b`, where `a` and `b` are scores of the same independent
    trials.

    If every score is 0 or 1, it is Tango's score interval (Statistics in Medicine 17, 1998) with
    the continuity correction of McNemar's test. Without the correction, four trials that all differ
    in one direction would count as a difference, although four coins show the same side one time in
    eight. For other scores, the differences are mapped to 0 to 1; the interval is that of
    `mean_score_interval`, with Student's t. In both cases the interval has a width even if all
    trials agree.

    Args:
        a: 0 to 1, [trials].
        b: scores of the same trials, [trials].

    Returns:
        Lower and upper bound. Both are NaN for fractions of fewer than `LEAST_BLOCKS` trials.
    """
    count = len(a)
    if {*a, *b} <= {0, 1}:
        only_a, only_b = (sum(x > y for x, y in zip(*both, strict=True)) for both in ((a, b), (b, a)))
        return _tango(only_a, only_b, count)
    if count < LEAST_BLOCKS:
        return math.nan, math.nan
    moved = [(1 + x - y) / 2 for x, y in zip(a, b, strict=True)]
    low, high = _wilson(fmean(moved), _effective_trials([moved]), float(t.ppf(0.975, count - 1)))
    return 2 * low - 1, 2 * high - 1


def _tango(only_a: int, only_b: int, trials: int) -> tuple[float, float]:
    """The differences that a score test with continuity correction does not reject at the 5 %
    level."""
    more = only_a - only_b

    def rejects(difference: float) -> float:
        """Positive where the test rejects."""
        linear = (2 * trials - more) * difference - only_a - only_b
        root = math.sqrt(linear**2 + 8 * trials * only_b * difference * (1 - difference))
        share = (root - linear) / (4 * trials)  # only b right: the maximum likelihood estimate
        variance = trials * (2 * share + difference * (1 - difference))
        return max(abs(more - trials * difference) - 1, 0) ** 2 - Z**2 * variance

    # the continuity correction: within one trial of the observed difference nothing is rejected
    low = -1.0 if rejects(-1) <= 0 else brentq(rejects, -1, (more - 1) / trials)
    high = 1.0 if rejects(1) <= 0 else brentq(rejects, (more + 1) / trials, 1)
    return float(low), float(high)


def _effective_trials(groups: Sequence[Sequence[float]]) -> float:
    """Number of trials with one common share whose mean has the variance of the mean over `groups`."""
    padded = [np.array([*group, 0.0, 1.0]) for group in groups]
    weights = [np.array([1.0] * len(group) + [0.5, 0.5]) / (len(group) + 1) for group in groups]
    means = [float(weight @ values) for weight, values in zip(weights, padded, strict=True)]
    variance = (
        sum(
            float(weight @ values**2 - mean**2) / len(group)
            for group, weight, values, mean in zip(groups, weights, padded, means, strict=True)
        )
        / len(groups) ** 2
    )
    mean = float(np.mean(means))
    return mean * (1 - mean) / variance


def _wilson(share: float, trials: float, z: float = Z) -> tuple[float, float]:
    """Wilson's 95% interval for a share and a number of trials that need not be whole."""
    centre = share + z * z / (2 * trials)
    half = z * math.sqrt(share * (1 - share) / trials + (z / (2 * trials)) ** 2)
    return (centre - half) / (1 + z * z / trials), (centre + half) / (1 + z * z / trials)
