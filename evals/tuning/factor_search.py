"""A search for LongRoPE factors, one for every rotary pair, by CMA-ES.

A point is the difference of ln lambda_i to the start for every pair, and of ln m. It is projected
onto the allowed set and measured there, so that every point is useful. In the allowed set, factors
lie between 1 and a maximum, and never decrease from a pair to the next slower one. LongRoPE (arXiv
2402.13753) searches the same set by mutation and crossover. CMA-ES (Hansen, arXiv 1604.00772; the
package `cmaes`) needs far fewer measurements.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from cmaes import CMA
from scipy.optimize import isotonic_regression

from ...errors import ConfigError, Setting
from ...scaling.longrope import LongRoPE
from ...scaling.rope import RopeSpec, Scaler

GENERATIONS = 40
"""The largest number of generations."""

Measure = Callable[[Sequence[LongRoPE]], list[float] | None]
"""Returns the mean loss of each scaler, in order; None if there was no time for all of them."""

_Vector = np.ndarray[tuple[int], np.dtype[np.float64]]

_CONVERGED = 1e-4  # nats between the best and the worst point of a generation
_STEP = 0.1  # first standard deviation of ln lambda, as a share of the logarithm of the largest
_STEP_OF_M = 0.02  # first standard deviation of ln m
_SEED = 0  # fixed, so that a continued search asks for the points that are stored already


@dataclass(frozen=True, kw_only=True)
class FactorSpace:
    """The LongRoPE scalers that a search can choose from, around a start.

    Args:
        rope: the model's rotary geometry.
        factor: target length over trained length, above 1. It is the reach of every scaler.
        logs: ln lambda_i of the start, float64 [rotating pairs], within the bounds and not
            decreasing.
        log_m: ln m of the start.
        largest: upper bound of lambda_i, above 1.
    """

    rope: RopeSpec
    factor: float
    logs: _Vector
    log_m: float
    largest: float

    @classmethod
    def around(cls, start: Scaler, rope: RopeSpec, target: int, largest: float | None = None) -> FactorSpace:
        """The space around the frequencies of `start` at `target` tokens.

        Args:
            largest: upper bound of the factors. None: the ratio N / L, or the largest factor of the
                start if that is more. A start beyond the bound is projected.

        Raises:
            ConfigError: `largest` leaves nothing to search.
        """
        factor = target / rope.trained_length
        if largest is not None and not math.inf > largest > 1:
            raise ConfigError(
                Setting("largest_factor", f"{largest:g}", "given"),
                f" must be finite and above 1, because factors lie between 1 and it; "
                f"give for example {factor:g}, the ratio of target and trained length",
            )
        pairs = rope.dim // 2 if rope.rotating_pairs is None else rope.rotating_pairs
        frequencies = start.frequencies(rope, target)
        logs = (rope.theta / frequencies.inv_freq)[:pairs].log().numpy()
        if largest is None:
            largest = max(factor, *np.exp(logs[np.isfinite(logs)]).tolist())
        return cls(
            rope=rope,
            factor=factor,
            logs=project(np.minimum(logs, math.log(largest)), largest),
            log_m=math.log(frequencies.attention_factor),
            largest=largest,
        )

    @property
    def dimension(self) -> int:
        """Coordinates of a point: one per rotating pair, and one for m."""
        return len(self.logs) + 1

    def scaler(self, point: _Vector) -> LongRoPE:
        """The scaler at a point, [dimension]. Zeros give the start.

        Factors have six digits: the loss does not depend on more, and specs stay readable.
        """
        step = _STEP * math.log(self.largest)
        logs = project(self.logs + step * point[:-1], self.largest)
        values = [min(max(float(f"{value:.6g}"), 1.0), self.largest) for value in np.exp(logs)]
        unrotated = self.rope.dim // 2 - len(values)  # these pairs do not rotate
        factors = tuple(values + values[-1:] * unrotated)
        m = float(f"{math.exp(self.log_m + _STEP_OF_M * point[-1]):.6g}")
        return LongRoPE(factor=self.factor, short=factors, long=factors, attention_factor=m)


@dataclass(frozen=True, kw_only=True)
class FoundFactors:
    """The result of a search.

    Attributes:
        scaler: the best one that was measured.
        loss: its mean loss at the places of the search, nats.
        start_loss: the loss of the start there, nats.
        evaluations: number of measured scalers.
    """

    scaler: LongRoPE
    loss: float
    start_loss: float
    evaluations: int

    def __str__(self) -> str:
        return f"loss {self.loss:.4f}, skimmed, from {self.start_loss:.4f} after {self.evaluations} evaluations"


def project(logs: _Vector, largest: float) -> _Vector:
    """The nearest logarithms in the Euclidean norm that do not decrease and lie in 0..ln(largest)."""
    ordered: _Vector = isotonic_regression(logs).x
    return np.clip(ordered, 0.0, math.log(largest))


def search_factors(
    space: FactorSpace,
    measure: Measure,
    *,
    generations: int = GENERATIONS,
    report: Callable[[int, FoundFactors], None] = lambda *_: None,
) -> FoundFactors | None:
    """Find the scaler of `space` with the lowest loss; None if there was no time for the start.

    The search ends when the losses of a generation are nearly equal, or when `measure` has no time.
    Equal losses give equal points.

    Args:
        report: called after each generation with its number and the result so far.
    """
    origin = space.scaler(np.zeros(space.dimension))
    losses = measure([origin])
    if losses is None:
        return None
    best, start_loss, evaluations = (losses[0], origin), losses[0], 1

    def result() -> FoundFactors:
        return FoundFactors(scaler=best[1], loss=best[0], start_loss=start_loss, evaluations=evaluations)

    optimiser = CMA(mean=np.zeros(space.dimension), sigma=1.0, seed=_SEED)
    for generation in range(1, generations + 1):
        points = [optimiser.ask() for _ in range(optimiser.population_size)]
        scalers = [space.scaler(point) for point in points]
        losses = measure(scalers)
        if losses is None:
            break
        evaluations += len(losses)
        best = min([best, *zip(losses, scalers, strict=True)], key=lambda pair: pair[0])
        optimiser.tell(list(zip(points, losses, strict=True)))
        report(generation, result())
        if max(losses) - min(losses) < _CONVERGED:
            break
    return result()
