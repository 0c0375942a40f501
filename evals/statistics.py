"""Intervals: of mean losses over correlated tokens, of shares of right answers, and of paired
differences of both."""

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
"""Below this many blocks no interval is given: resampling two or three numbers says nothing."""

_VALUES_AT_ONCE = 2**22
_Z = float(norm.ppf(0.975))


def block_means(losses: Losses, block: int = 32) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Means of runs of `block` consecutive tokens, [tokens // block].

    What is left over is spread among the blocks, so that every token counts; sizes differ by one at
    most once there are `block` blocks.
    """
    values = np.asarray(losses, dtype=np.float64).ravel()
    count = max(len(values) // block, 1)
    return np.array([part.mean() for part in np.array_split(values, count)])


def block_interval(losses: Losses, block: int = 32, confidence: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Percentile-bootstrap interval of the mean of `losses`, resampling blocks of consecutive
    tokens.

    Neighbouring tokens are hard or easy together, so an interval over single tokens would be too
    narrow. Percentiles of few blocks lie too near to the mean; they are moved away from it as
    Student's interval is wider than one of the normal distribution with the variance of the sample
    (Hesterberg, The American Statistician 69, 2015). The same losses and seed give the same
    interval to the bit.

    Args:
        losses: nats per token, [tokens], in the order of the text.
        block: tokens per block; longer than the text's correlation.
        confidence: share of intervals that hold the mean.
        seed: of the resampling.

    Returns:
        Both bounds in nats per token; NaN twice below `LEAST_BLOCKS` blocks.
    """
    means = block_means(losses, block)
    count = len(means)
    if count < LEAST_BLOCKS:
        return math.nan, math.nan
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
    """Mean of `a - b` and its 95% interval, token by token on the same tokens.

    What makes a token hard for both cancels, so this is far narrower than two intervals side by
    side.

    Args:
        a: nats per token, [tokens].
        b: nats for the same tokens, [tokens].
        block: as in `block_interval`.

    Returns:
        (mean, low, high) in nats per token; the bounds are NaN below `LEAST_BLOCKS` blocks.

    Raises:
        DataError: the two do not hold the same number of tokens.
    """
    if np.shape(a) != np.shape(b):
        raise DataError(f"losses of {np.size(a)} and {np.size(b)} tokens cannot be paired; they must score the same")
    difference = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    return float(difference.mean()), *block_interval(difference, block)


def share_interval(right: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share: `right` of `trials` independent trials (Wilson, JASA 22,
    1927).

    Unlike the textbook's, it stays within 0 and 1 and has a width at 0 % and 100 %.
    """
    interval = binomtest(right, trials).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def score_interval(scores: Sequence[float], confidence: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Interval of the mean score of independent trials: Wilson's where all scores are 0 or 1, else
    a percentile bootstrap.

    Args:
        scores: 0 to 1, [trials].
        confidence: share of intervals that hold the mean.
        seed: of the resampling; the same scores and seed give the same interval to the bit.

    Returns:
        Both bounds; NaN twice for fractions that are all alike or fewer than `LEAST_BLOCKS`, of which resampling
        makes nothing.
    """
    if {*scores} <= {0, 1}:
        return share_interval(round(sum(scores)), len(scores), confidence)
    if len({*scores}) == 1:
        return math.nan, math.nan
    low, high = block_interval(np.array(scores), 1, confidence, seed)
    return max(low, 0.0), min(high, 1.0)


def mean_interval(groups: Sequence[Sequence[float]]) -> tuple[float, float]:
    """95% interval of the mean over `groups` of their mean scores: Wilson's with the effective
    number of trials.

    That is how many trials of one share would vary as this mean does (as for surveys with strata:
    Korn and Graubard, Survey Methodology 24, 1998). Every group's variance is taken with half a
    right and half a wrong answer more, so that a task whose few trials are all right does not count
    as certain; a bootstrap would take it so. Simulated with 11 tasks of 2 to 20 trials it holds the
    mean in 94% to 99% of cases.

    Args:
        groups: scores of independent trials, 0 to 1; a group is one task.
    """
    if len(groups) == 1:
        return score_interval(groups[0])
    return _wilson(float(np.mean([np.mean(group) for group in groups])), _effective_trials(groups))


def paired_score_interval(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """95% interval of the mean of `a - b` over independent trials that both did.

    Where all scores are 0 or 1 it is Tango's score interval (Statistics in Medicine 17, 1998) with
    the continuity correction of McNemar's test: without it four trials that all differ in one
    direction would tell the two apart, and four coins fall alike one time in eight. Otherwise it is
    that of `mean_interval`, with Student's t, of the differences moved to 0 to 1. Both have a width
    where all trials agree.

    Args:
        a: 0 to 1, [trials].
        b: scores of the same trials, [trials].

    Returns:
        Both bounds; NaN twice for fractions of fewer than `LEAST_BLOCKS` trials.
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
    """The differences that a score test with continuity correction does not reject at 5 %."""
    more = only_a - only_b

    def rejects(difference: float) -> float:
        """Above 0 where the test rejects."""
        linear = (2 * trials - more) * difference - only_a - only_b
        root = math.sqrt(linear**2 + 8 * trials * only_b * difference * (1 - difference))
        share = (root - linear) / (4 * trials)  # of trials that b alone has right: the likeliest if the test is right
        variance = trials * (2 * share + difference * (1 - difference))
        return max(abs(more - trials * difference) - 1, 0) ** 2 - _Z**2 * variance

    # nothing is rejected where one trial more or less would make the difference
    low = -1.0 if rejects(-1) <= 0 else brentq(rejects, -1, (more - 1) / trials)
    high = 1.0 if rejects(1) <= 0 else brentq(rejects, (more + 1) / trials, 1)
    return float(low), float(high)


def _effective_trials(groups: Sequence[Sequence[float]]) -> float:
    """How many trials of one share would vary as the mean over `groups` of their means does."""
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


def _wilson(share: float, trials: float, z: float = _Z) -> tuple[float, float]:
    """Wilson's 95% interval where neither the number of right answers nor that of trials is
    whole."""
    centre = share + z * z / (2 * trials)
    half = z * math.sqrt(share * (1 - share) / trials + (z / (2 * trials)) ** 2)
    return (centre - half) / (1 + z * z / trials), (centre + half) / (1 + z * z / trials)
