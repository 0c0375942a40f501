"""Intervals: for mean losses over correlated tokens, by a bootstrap over blocks; for shares of right answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import binomtest, bootstrap

from ..errors import DataError

Losses = np.ndarray[Any, np.dtype[Any]]

LEAST_BLOCKS = 4
"""Below this many blocks no interval is given: resampling two or three numbers says nothing."""

_VALUES_AT_ONCE = 2**22


def block_means(losses: Losses, block: int = 32) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Means of runs of `block` consecutive tokens, [tokens // block].

    What is left over is spread among the blocks, so that every token counts; sizes differ by one at most
    once there are `block` blocks.
    """
    values = np.asarray(losses, dtype=np.float64).ravel()
    count = max(len(values) // block, 1)
    return np.array([part.mean() for part in np.array_split(values, count)])


def block_interval(losses: Losses, block: int = 32, confidence: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Percentile-bootstrap interval of the mean of `losses`, resampling blocks of consecutive tokens.

    Neighbouring tokens are hard or easy together, so an interval over single tokens would be too narrow.
    The same losses and seed give the same interval to the bit.

    Args:
        losses: nats per token, [tokens], in the order of the text.
        block: tokens per block; longer than the text's correlation.
        confidence: share of intervals that hold the mean.
        seed: of the resampling.

    Returns:
        Both bounds in nats per token; NaN twice below `LEAST_BLOCKS` blocks.
    """
    means = block_means(losses, block)
    if len(means) < LEAST_BLOCKS:
        return math.nan, math.nan
    interval = bootstrap(
        (means,),
        np.mean,
        vectorized=True,
        confidence_level=confidence,
        method="percentile",
        batch=max(_VALUES_AT_ONCE // len(means), 1),
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def paired_difference(a: Losses, b: Losses, block: int = 32) -> tuple[float, float, float]:
    """Mean of `a - b` and its 95% interval, token by token on the same tokens.

    What makes a token hard for both cancels, so this is far narrower than two intervals side by side.

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
    """Wilson's score interval of a share: `right` of `trials` independent trials (Wilson, JASA 22, 1927).

    Unlike the textbook's, it stays within 0 and 1 and has a width at 0 % and 100 %.
    """
    interval = binomtest(right, trials).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def score_interval(groups: Sequence[Sequence[float]], confidence: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Interval of the mean over `groups` of their mean scores.

    Scores of 0 and 1 in one group, or all alike, are a share and get Wilson's interval; others a percentile
    bootstrap that resamples the trials within each group.

    Args:
        groups: scores of independent trials, 0 to 1; a group is one task.
        confidence: share of intervals that hold the mean.
        seed: of the resampling; the same scores and seed give the same interval to the bit.

    Returns:
        Both bounds; NaN twice for fractions that are all alike or fewer than `LEAST_BLOCKS`, of which resampling
        makes nothing.
    """
    scores = [score for group in groups for score in group]
    if {*scores} <= {0, 1} and (len(groups) == 1 or len({*scores}) == 1):
        return share_interval(round(sum(scores)), len(scores), confidence)
    if len({*scores}) == 1 or min(map(len, groups)) < 2 or len(scores) < LEAST_BLOCKS:
        return math.nan, math.nan

    def mean_of_means(*samples: Losses, axis: int = -1) -> Losses:
        means: Losses = np.stack([sample.mean(axis) for sample in samples]).mean(0)
        return means

    interval = bootstrap(
        [np.array(group, dtype=np.float64) for group in groups],
        mean_of_means,
        vectorized=True,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(interval.low), float(interval.high)
