"""How far every method goes by every rule that was measured."""

from __future__ import annotations

from collections.abc import Sequence

from ...scaling import format_length
from ..protocols.effective_length import (
    LEAST_FOUND,
    LEAST_KEPT,
    TOLERANCE,
    EffectiveLength,
    by_lower_bounds,
    effective_length,
    length_or_more,
    reaches,
)
from ..protocols.fixed_target import FixedTarget
from ..retrieval.score import settings
from ..runs import compare
from ..runs.compare import UNTOUCHED
from ..runs.result import Row, Run
from .grid import NOTHING, Grid, Shown

_NOTE = (
    f"Loss: the largest context whose difference to the untouched model at its trained length has an upper bound of "
    f"at most +{TOLERANCE:g} nats. A longer one is undecided where the interval holds that bound, and fails where it "
    f"lies above; --samples N says how many, at least, would decide the first. Passkey, niah and kv: the largest "
    f"length such that it and all measured below it give {LEAST_FOUND:.0%}. RULER-11: such that they keep "
    f"{LEAST_KEPT:.0%} of the method's own score at the trained length. Only measured lengths count; below it, the "
    "length that the 95% intervals guarantee."
)


def reach_table(run: Run) -> Grid | None:
    """Methods down, rules across; None where no rule has what it needs."""
    columns: dict[str, dict[str, Shown]] = {}
    for group in compare.settings(run.rows):
        if group[0]["protocol"] == FixedTarget.name and (found := _by_loss(run, group)):
            columns[_free(f"loss on {compare.short(group[0]['text'])}", columns)] = found
    for setting in settings(run.rows):
        if by_score := reaches(setting):
            columns[_free(setting.name, columns)] = {
                rope: _shown(own.length, own.certain, own.longest) for rope, own in by_score.items()
            }
    if not columns:
        return None
    methods = sorted(dict.fromkeys(rope for own in columns.values() for rope in own), key=lambda r: r != UNTOUCHED)
    return Grid(
        title="Effective length by rule",
        note=_NOTE,
        columns=tuple(columns),
        rows=[(rope, [own.get(rope, NOTHING) for own in columns.values()]) for rope in methods],
    )


def _free(name: str, taken: dict[str, dict[str, Shown]]) -> str:
    number = sum(own == name or own.startswith(f"{name} (") for own in taken) + 1
    return name if number == 1 else f"{name} ({number})"


def _by_loss(run: Run, group: Sequence[Row]) -> dict[str, Shown]:
    delta = compare.deltas(run, group)
    found = {rope: effective_length(group, delta, rope) for rope in compare.methods(group)}
    longest = max(row["context"] for row in group)
    return {rope: _state(reach, longest) for rope, reach in found.items() if reach is not None}


def _state(reach: EffectiveLength, longest: int) -> Shown:
    """Reached, undecided or failed, and below it what is said of longer contexts."""
    small = []
    if reach.undecided:
        small.append(f"{_lengths(reach.undecided)} undecided: {reach.remedy}")
    if reach.fails and (reach.length or reach.undecided):
        small.append(f"fails at {_lengths(reach.fails)}")
    if reach.length:
        return Shown(main=length_or_more(reach.length, longest), small=tuple(small))
    return Shown(main="undecided" if reach.undecided else "fails", small=tuple(small), css="none")


def _lengths(lengths: Sequence[int]) -> str:
    return ", ".join(map(format_length, lengths))


def _shown(length: int | None, certain: int | None, longest: int) -> Shown:
    small = () if certain == length else (by_lower_bounds(certain, longest),)
    return Shown(main=length_or_more(length, longest), small=small, css="" if length else "none")
