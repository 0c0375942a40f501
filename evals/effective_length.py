"""The effective length of a method, by the rule that is printed with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .compare import Difference
from .result import Row

TOLERANCE = 0.02
"""Nats per token by which a context may be worse than the trained length and still count."""


@dataclass(frozen=True, kw_only=True)
class EffectiveLength:
    """How far a method goes.

    Args:
        length: the largest measured context that keeps the rule; None if none does.
        breaks: contexts from the trained length up to `length` that do not keep it all the same.
        undecided: contexts beyond `length` whose interval holds the tolerance: more tokens would tell.
    """

    length: int | None
    breaks: tuple[int, ...] = ()
    undecided: tuple[int, ...] = ()


def is_kept(change: Difference) -> bool:
    """The rule: the upper bound of the difference to the untouched model at its trained length is at most
    `TOLERANCE`."""
    return change.high <= TOLERANCE


def effective_length(rows: Sequence[Row], delta: Mapping[str, Difference], rope: str) -> EffectiveLength | None:
    """The largest context of `rope` that keeps the rule; None if no context of it has an interval.

    Args:
        rows: one fixed-target setting.
        delta: `compare.deltas` of these rows.
        rope: a rope spec.
    """
    found = {
        row["context"]: delta[row["key"]]
        for row in sorted(rows, key=lambda row: int(row["context"]))
        if row["rope"] == rope and row["key"] in delta and delta[row["key"]].has_interval
    }
    if not found:
        return None
    length = max((context for context, change in found.items() if is_kept(change)), default=None)
    trained, reached = rows[0]["trained_length"], length or 0
    return EffectiveLength(
        length=length,
        breaks=tuple(c for c, change in found.items() if trained <= c < reached and not is_kept(change)),
        undecided=tuple(c for c, change in found.items() if c > reached and change.low <= TOLERANCE < change.high),
    )
