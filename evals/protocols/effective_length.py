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
from ..statistics import Z

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
    """How far a method goes: every context from the trained length on is reached, undecided or failed.

    Args:
        length: the largest measured context that keeps the rule; None if none does.
        breaks: contexts from the trained length up to `length` that do not keep it all the same.
        undecided: contexts beyond `length` whose interval holds the tolerance: more samples would
            decide them.
        fails: contexts beyond `length` whose interval lies above the tolerance.
        samples: how many samples, at least, would decide the first of `undecided`; None if it is
            too close.
        is_used_up: whether the text has no room for more samples there.
    """

    length: int | None
    breaks: tuple[int, ...] = ()
    undecided: tuple[int, ...] = ()
    fails: tuple[int, ...] = ()
    samples: int | None = None
    is_used_up: bool = False

    @property
    def remedy(self) -> str:
        """What would decide the first of `undecided`: `about 24 samples`."""
        return _needed(self.samples, self.is_used_up)

    def __str__(self) -> str:
        """`reaches 8k, 12k undecided (about 24 samples would decide it), fails at 16k`."""
        parts = []
        if self.length:
            but = f" (but not {_lengths(self.breaks)})" if self.breaks else ""
            parts.append(f"reaches {format_length(self.length)}{but}")
        if self.undecided:
            parts.append(f"{_lengths(self.undecided)} undecided ({remedy(self.samples, self.is_used_up)})")
        if self.fails:
            parts.append(f"fails at {_lengths(self.fails)}")
        return ", ".join(parts)


def remedy(samples: int | None, is_used_up: bool) -> str:
    """What would decide an interval, in words. None is more than can be advised."""
    needed = _needed(samples, is_used_up)
    return needed if samples is None else f"{needed} would decide it"


def _needed(samples: int | None, is_used_up: bool) -> str:
    if samples is None:
        return "too close to the limit to decide"
    return f"about {samples} samples{' of a longer text' if is_used_up else ''}"


def is_used_up(row: Row) -> bool:
    """True if the text had no room for as many samples as were asked for."""
    return bool(row["documents"] < (row.get("samples") or 0))


def _lengths(lengths: Sequence[int]) -> str:
    return ", ".join(map(format_length, lengths))


def is_kept(change: Difference) -> bool:
    """The rule: the upper bound of the difference to the untouched model at its trained length is
    at most `TOLERANCE`."""
    return change.high <= TOLERANCE


def effective_length(rows: Sequence[Row], delta: Mapping[str, Difference], rope: str) -> EffectiveLength | None:
    """The largest context of `rope` that keeps the rule; None if nothing can be said.

    Contexts below the trained length count only if they keep the rule: a model that reads less is
    worse without failing.

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
    beyond = {c: change for c, change in differences.items() if c > reached and c >= trained}
    if length is None and not beyond:
        return None
    undecided = tuple(c for c, change in beyond.items() if change.low <= TOLERANCE < change.high)
    first = undecided[0] if undecided else None
    return EffectiveLength(
        length=length,
        breaks=tuple(c for c, change in differences.items() if trained <= c < reached and not is_kept(change)),
        undecided=undecided,
        fails=tuple(c for c, change in beyond.items() if change.low > TOLERANCE),
        samples=None if first is None else samples_to_decide(differences[first], measured[first]["documents"]),
        is_used_up=first is not None and is_used_up(measured[first]),
    )


def samples_to_decide(change: Difference, samples: int, limit: float = TOLERANCE) -> int | None:
    """How many samples would move the interval of `change` off `limit`, if its mean stays.

    The width of an interval falls with the square root of their number. The interval of one sample
    knows nothing of the spread between samples, so this is the least. None where more than
    `MOST_SAMPLES` would be needed.

    Args:
        change: an interval that holds `limit`.
        samples: how many it comes from.
    """
    bound = change.high if change.mean <= limit else change.low
    gap = abs(limit - change.mean)
    needed = samples * ((bound - change.mean) / gap) ** 2 if gap else math.inf
    return math.floor(needed) + 1 if needed < MOST_SAMPLES else None


@dataclass(frozen=True, kw_only=True)
class Reach:
    """How far a method finds things.

    Args:
        length: the largest measured length such that the lower bound of its 95% interval, and of
            all measured below it, keeps the rule; None if that of the shortest does not.
        mean: the same by the mean scores.
        longest: the largest length that was measured.
        undecided: the first length beyond `length`, if its interval holds the least score.
        fails: the first length beyond `length` whose interval lies below the least score.
        trials: about how many trials would decide `undecided`; None if it is too close.
    """

    length: int | None
    mean: int | None
    longest: int
    undecided: int | None = None
    fails: int | None = None
    trials: int | None = None

    @property
    def state(self) -> str:
        """`8k`, `16k or more` where 16k is the longest measured, `undecided` or `fails`."""
        if self.length is not None:
            return length_or_more(self.length, self.longest)
        return "fails" if self.undecided is None else "undecided"

    @property
    def notes(self) -> list[str]:
        """What is said of lengths beyond `length`."""
        notes = []
        if self.undecided is not None:
            needed = "too close to the limit to decide"
            if self.trials is not None:
                needed = f"about {self.trials} trials would decide it"
            by_mean = "" if self.mean == self.length else f"; by the mean {length_or_more(self.mean, self.longest)}"
            notes.append(f"{format_length(self.undecided)} undecided ({needed}{by_mean})")
        if self.fails is not None:
            notes.append(f"fails at {format_length(self.fails)}")
        return notes

    def __str__(self) -> str:
        """`reaches 8k, fails at 16k`."""
        return ", ".join([*([] if self.length is None else [f"reaches {self.state}"]), *self.notes])


def reach(scores: Mapping[int, TrialScore], least: float) -> Reach:
    """The lengths up to which scores are at least `least`.

    Args:
        scores: of one method by length; at least one.
        least: the score that must be reached, 0 to 1; infinite if no length can keep the rule.
    """
    lengths = sorted(scores)

    def up_to(values: Mapping[int, float]) -> int | None:
        longest_kept = None
        for length in lengths:
            if not values[length] >= least:  # an unknown bound is NaN, and keeps nothing
                break
            longest_kept = length
        return longest_kept

    length = up_to({length: score.low for length, score in scores.items()})
    beyond = [n for n in lengths if n > (length or 0)]
    undecided = beyond[0] if beyond and not scores[beyond[0]].high < least else None
    return Reach(
        length=length,
        mean=up_to({length: score.mean for length, score in scores.items()}),
        longest=lengths[-1],
        undecided=undecided,
        fails=next((n for n in beyond if scores[n].high < least), None),
        trials=None if undecided is None else trials_to_decide(scores[undecided].mean, least),
    )


def trials_to_decide(mean: float, least: float) -> int | None:
    """How many trials would move Wilson's 95% interval around `mean` off `least`; None above `MOST_SAMPLES`."""
    gap = abs(mean - least)
    needed = Z**2 * least * (1 - least) / gap**2 if gap else math.inf
    return math.floor(needed) + 1 if needed < MOST_SAMPLES else None


def reaches(group: ScoreGroup) -> dict[str, Reach]:
    """How far the methods of a group find things, each by the rule of its suite.

    Passkey, niah and kv: `LEAST_FOUND`. RULER-11: `LEAST_KEPT` of the method's own score at the
    trained length, so only where all its tasks were measured, and of methods that were measured at
    that length. One that finds nothing there reaches no length.
    """
    is_relative, trained = group.suite == RULER, group.trained_length
    if is_relative and group.tasks != [*SUITES[RULER]]:
        return {}
    by_method = {}
    for rope in group.methods:
        scores = group.scores(rope)
        if not is_relative and scores:
            by_method[rope] = reach(scores, LEAST_FOUND)
        elif trained in scores:
            at_trained = scores[trained].mean  # a share of zero is reached everywhere
            by_method[rope] = reach(scores, LEAST_KEPT * at_trained if at_trained > 0 else math.inf)
    return by_method


def length_or_more(length: int | None, longest: int) -> str:
    """`8k`, `16k or more` where 16k is the longest measured, `none` for no length."""
    if length is None:
        return "none"
    return f"{format_length(length)} or more" if length == longest else format_length(length)
