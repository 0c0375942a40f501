"""The effective length of a method, by the rule that is printed with it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...scaling import format_length
from ..retrieval.score import ScoreGroup, TrialScore
from ..retrieval.tasks import RULER, SUITES
from ..runs.compare import Difference
from ..runs.result import Row

TOLERANCE = 0.02
"""Nats per token by which a context may be worse than the trained length and still count."""

MOST_SAMPLES = 1000
"""Samples beyond which no advice is given."""

LEAST_FOUND = 0.80
"""Share of passkeys, needles or values that a length must give to count."""

LEAST_KEPT = 0.90
"""Share of its own score at the trained length that a method must keep of RULER-11 for a length to
count."""


@dataclass(frozen=True, kw_only=True)
class EffectiveLength:
    """How far a method goes.

    Args:
        length: the largest measured context that keeps the rule; None if none does.
        breaks: contexts from the trained length up to `length` that do not keep it all the same.
        undecided: contexts beyond `length` whose interval holds the tolerance: more samples would
            decide them.
        fails: contexts beyond `length` whose interval lies above the tolerance.
        samples: how many samples, at least, would decide the first of `undecided`; None if it is
            too close.
    """

    length: int | None
    breaks: tuple[int, ...] = ()
    undecided: tuple[int, ...] = ()
    fails: tuple[int, ...] = ()
    samples: int | None = None

    @property
    def remedy(self) -> str:
        """What would decide the first of `undecided`, as the command is written."""
        return "too close to the limit to decide" if self.samples is None else f"--samples {self.samples} or more"


def is_kept(change: Difference) -> bool:
    """The rule: the upper bound of the difference to the untouched model at its trained length is
    at most `TOLERANCE`."""
    return change.high <= TOLERANCE


def effective_length(rows: Sequence[Row], delta: Mapping[str, Difference], rope: str) -> EffectiveLength | None:
    """The largest context of `rope` that keeps the rule; None if no context of it has an interval.

    Args:
        rows: one fixed-target group.
        delta: `compare.deltas` of these rows.
        rope: a rope spec.
    """
    measured = {
        row["context"]: row
        for row in sorted(rows, key=lambda row: int(row["context"]))
        if row["rope"] == rope and row["key"] in delta and delta[row["key"]].has_interval
    }
    if not measured:
        return None
    differences = {context: delta[row["key"]] for context, row in measured.items()}
    length = max((context for context, change in differences.items() if is_kept(change)), default=None)
    trained, reached = rows[0]["trained_length"], length or 0
    undecided = tuple(c for c, change in differences.items() if c > reached and change.low <= TOLERANCE < change.high)
    first = undecided[0] if undecided else None
    return EffectiveLength(
        length=length,
        breaks=tuple(c for c, change in differences.items() if trained <= c < reached and not is_kept(change)),
        undecided=undecided,
        fails=tuple(c for c, change in differences.items() if c > reached and change.low > TOLERANCE),
        samples=None if first is None else samples_to_decide(differences[first], measured[first]["documents"]),
    )


def samples_to_decide(change: Difference, samples: int) -> int | None:
    """How many samples would move the interval of `change` off the tolerance, if its mean stays.

    The width of an interval falls with the square root of their number. The interval of one sample
    knows nothing of the spread between samples, so this is the least. None where more than
    `MOST_SAMPLES` would be needed.

    Args:
        change: an interval that holds `TOLERANCE`.
        samples: how many it comes from.
    """
    bound = change.high if change.mean <= TOLERANCE else change.low
    gap = abs(TOLERANCE - change.mean)
    needed = samples * ((bound - change.mean) / gap) ** 2 if gap else math.inf
    return math.floor(needed) + 1 if needed < MOST_SAMPLES else None


@dataclass(frozen=True, kw_only=True)
class Reach:
    """How far a method finds things.

    Args:
        length: the largest measured length such that it and all measured below it keep the rule;
            None if the shortest does not.
        certain: the same with the lower bounds of 95% intervals.
        longest: the largest length that was measured.
    """

    length: int | None
    certain: int | None
    longest: int


def reach(scores: Mapping[int, TrialScore], least: float) -> Reach:
    """The lengths up to which scores are at least `least`.

    Args:
        scores: of one method by length; at least one.
        least: the score that must be reached, 0 to 1.
    """
    lengths = sorted(scores)

    def up_to(values: Mapping[int, float]) -> int | None:
        longest_kept = None
        for length in lengths:
            if not values[length] >= least:  # an unknown bound is NaN, and keeps nothing
                break
            longest_kept = length
        return longest_kept

    return Reach(
        length=up_to({length: score.mean for length, score in scores.items()}),
        certain=up_to({length: score.low for length, score in scores.items()}),
        longest=lengths[-1],
    )


def reaches(group: ScoreGroup) -> dict[str, Reach]:
    """How far the methods of a group find things, each by the rule of its suite.

    Passkey, niah and kv: `LEAST_FOUND`. RULER-11: `LEAST_KEPT` of the method's own score at the
    trained length, so only where all its tasks were measured, and of methods that were measured at
    that length. One that finds nothing there reaches no length.
    """
    of_own, trained = group.suite == RULER, group.trained_length
    if of_own and group.tasks != [*SUITES[RULER]]:
        return {}
    by_method = {}
    for rope in group.methods:
        scores = group.scores(rope)
        if not of_own and scores:
            by_method[rope] = reach(scores, LEAST_FOUND)
        elif trained in scores:
            at_trained = scores[trained].mean  # a share of zero is reached everywhere
            by_method[rope] = reach(scores, LEAST_KEPT * at_trained if at_trained > 0 else math.inf)
    return by_method


def length_or_more(length: int | None, longest: int) -> str:
    """`8k`, `16k or more` where 16k is the longest measured, or `no measured length`."""
    if length is None:
        return "no measured length"
    return f"{format_length(length)} or more" if length == longest else format_length(length)


def by_lower_bounds(certain: int | None, longest: int) -> str:
    """`by the lower bounds: 8k`, or `by the lower bounds: none`."""
    return f"by the lower bounds: {'none' if certain is None else length_or_more(certain, longest)}"
