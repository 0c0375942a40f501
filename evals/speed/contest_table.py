"""A comparison of engines as tables for the screen and as one line of JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rich import box
from rich.table import Table

from .contest import Outcome, Spread, Timing


def tables(outcome: Outcome, first: str) -> list[Table]:
    """Decode and prefill speeds, and what shows that the engines ran the same model.

    Args:
        first: the name of the engine that the others are compared with.
    """
    return [_speeds(outcome, "decode", first), _speeds(outcome, "prefill", first), _checks(outcome, first)]


def as_json(outcome: Outcome, about: Mapping[str, Any]) -> dict[str, Any]:
    """Everything, `about` first, for one line of JSON."""
    return {
        **about,
        "bandwidth_gb_s": outcome.bandwidth / 1e9,
        "timings": [asdict(timing) for timing in outcome.timings],
        "agreements": [asdict(agreement) for agreement in outcome.agreements],
    }


def _speeds(outcome: Outcome, what: str, first: str) -> Table:
    note = f"ratio: {first} over the engine, of the same turn"
    headings = ["median", "range", "ratio", "range"]
    if what == "decode":
        note += f"; memory: of what {outcome.bandwidth / 1e9:.1f} GB/s would allow"
        headings.append("memory")
    table = _table(f"{what}, tokens a second ({note})", headings)
    for timing in outcome.timings:
        if timing.what == what:
            table.add_row(*_row(timing, first), end_section=_is_last(outcome, timing))
    return table


def _table(title: str, headings: list[str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("context", justify="right", no_wrap=True)
    table.add_column("engine", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _row(timing: Timing, first: str) -> list[str]:
    ratio = ("", "") if timing.engine == first else (f"{timing.ratio.median:.2f}", _range(timing.ratio, 2))
    digits = 1 if timing.speed.median < 100 else 0
    cells = [
        str(timing.length),
        timing.engine,
        f"{timing.speed.median:.{digits}f}",
        _range(timing.speed, digits),
        *ratio,
    ]
    return cells if timing.memory_share is None else [*cells, f"{timing.memory_share:.0%}"]


def _range(spread: Spread, digits: int) -> str:
    return f"{spread.lowest:.{digits}f}-{spread.highest:.{digits}f}"


def _is_last(outcome: Outcome, timing: Timing) -> bool:
    """Of its kind and length."""
    alike = [one for one in outcome.timings if (one.what, one.length) == (timing.what, timing.length)]
    return alike[-1] is timing


def _checks(outcome: Outcome, first: str) -> Table:
    headings = ["same next token", "logits off by", "peak memory"]
    table = _table(f"the same model as {first}? (peak memory: resident, with libraries and loading)", headings)
    rows = outcome.agreements
    for index, one in enumerate(rows):
        peak = "?" if one.peak_memory_mb is None else f"{one.peak_memory_mb:.0f} MB"
        check = ("", "") if one.engine == first else (f"{one.same} of {one.compared}", f"{one.difference:.2g}")
        ends = index + 1 == len(rows) or rows[index + 1].length != one.length
        table.add_row(str(one.length), one.engine, *check, peak, end_section=ends)
    return table
