"""The rows of `facts` as shares of right answers, in a table and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

from ...scaling.lengths import format_length
from ..reports import style
from ..runs.compare import METHOD, by_setting, short
from ..runs.result import Row
from ..statistics import share_interval
from .facts import way_name

LEGEND = (
    "Right: the share of questions whose first number is the right one, with Wilson's 95% interval (questions to one "
    "document are not independent: true intervals are somewhat wider). Seconds: the first question to a document, "
    "which reads it, and the median of the others."
)
"""What the columns are."""

_APART = METHOD | {
    *("context", "way", "parts", "document", "question"),
    *("key", "correct", "answer", "generated", "sources", "seconds", "peak_memory_mb"),
}
"""Fields of the rows of one table that differ: its columns, and what was measured."""


@dataclass(frozen=True, kw_only=True)
class WayScore:
    """One way of reading at one length.

    Attributes:
        name: of the way, for people.
        way, parts, rope, context: as in the rows.
        right: the share of right answers, with its interval `low` to `high`.
        trials: answers.
        first, later: seconds of the first question to a document, and of the others.
    """

    name: str
    way: str
    parts: int
    rope: str
    context: int
    right: float
    low: float
    high: float
    trials: int
    first: float
    later: float


def facts_rows(rows: Sequence[Row]) -> list[Row]:
    """Those of such questions."""
    return [row for row in rows if row.get("experiment") == "facts"]


def way_scores(rows: Sequence[Row]) -> list[WayScore]:
    """A score for every length and way of one setting, in the order of the rows."""
    groups: dict[tuple[int, str, int, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["context"], row["way"], row["parts"], row["rope"]), []).append(row)
    found = []
    for (context, way, parts, rope), group in groups.items():
        right = sum(row["correct"] for row in group)
        low, high = share_interval(round(right), len(group))
        first = {row["document"]: row for row in reversed(group)}
        later = [row["seconds"] for row in group if row not in first.values()]
        found.append(
            WayScore(
                name=way_name(way, parts) + (f", {rope}" if way == "whole" else ""),
                way=way,
                parts=parts,
                rope=rope,
                context=context,
                right=right / len(group),
                low=low,
                high=high,
                trials=len(group),
                first=fmean(row["seconds"] for row in first.values()),
                later=median(later) if later else float("nan"),
            )
        )
    return sorted(found, key=lambda score: score.context)


def to_markdown(rows: Sequence[Row]) -> str:
    """A table for every setting, with what was measured above it."""
    return "\n".join(map(_table, by_setting(facts_rows(rows), _APART)))


def _table(rows: Sequence[Row]) -> str:
    scores, row = way_scores(rows), rows[0]
    lines = [
        f"{row['facts']} facts in {short(row['text'])}, {short(row['model'])} ({row['dtype']}, trained at "
        f"{format_length(row['trained_length'])}). {LEGEND}",
        "",
        "| the document is | length | right | 95% | questions | first, s | later, s |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for s in scores:
        name = s.name.replace("|", "\\|")
        lines.append(
            f"| {name} | {format_length(s.context)} | {s.right:.0%} | {s.low:.0%} to {s.high:.0%} | {s.trials} "
            f"| {s.first:.0f} | {s.later:.1f} |"
        )
    return "\n".join(lines) + "\n"


def plot_facts(rows: Sequence[Row], out_stem: Path) -> list[Path]:
    """Shares of right answers with their intervals, a bar for each way; writes `out_stem`.png and .svg, `out_stem`_2
    for a second setting, and so on."""
    groups = by_setting(facts_rows(rows), _APART)
    return [path for group, stem in zip(groups, style.stems(out_stem), strict=False) for path in _plot(group, stem)]


def _plot(rows: Sequence[Row], out_stem: Path) -> tuple[Path, Path]:
    scores = way_scores(rows)
    lengths = list(dict.fromkeys(score.context for score in scores))
    row = rows[0]
    title = f"Facts in a long document: {short(row['model'])} ({row['dtype']}) on {short(row['text'])}"
    with style.figure(8.5, 1.4 + 0.34 * len(scores), title) as fig:
        panels = fig.subplots(len(lengths), 1, squeeze=False)[:, 0]
        for axes, length in zip(panels, lengths, strict=True):
            own = [score for score in scores if score.context == length][::-1]
            style.style_axes(axes, x="share of questions answered right", y="")
            axes.grid(axis="y", visible=False)
            axes.grid(axis="x", color=style.GRID, linewidth=0.8)
            colors = dict(zip(("cut", "whole", "parts"), style.categories(3), strict=True))
            axes.barh(range(len(own)), [s.right for s in own], 0.6, color=[colors[s.way] for s in own])
            axes.hlines(range(len(own)), [s.low for s in own], [s.high for s in own], color=style.INK, lw=1)
            axes.set_yticks(range(len(own)), [s.name for s in own])
            axes.set_xlim(0, 1)
            axes.set_title(f"{format_length(length)} tokens, {own[0].trials} questions", loc="left", color=style.MUTED)
        note = (
            "Bars: shares; lines: Wilson's 95% intervals. Parts are read one by one, and their answers pooled (NBCE)."
        )
        fig.supxlabel(note, **style.FOOTNOTE)
        return style.save(fig, out_stem)
