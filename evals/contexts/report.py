"""Tables and plots of `ropewalk facts` and `ropewalk endless`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

from rich.console import Console
from rich.markdown import Markdown

from ...engine.storage import write_atomic
from ...scaling.lengths import format_length
from ..reports import style
from ..reports.report import print_files, print_left_out
from ..runs.cell import Cell
from ..runs.compare import METHOD, group_rows, short
from ..runs.result import Row, Run
from ..statistics import wilson_interval
from .facts import way_name

FACTS_LEGEND = (
    "Right: the share of answers whose first number is right, with Wilson's 95% interval (questions about one "
    "document are not independent, so true intervals are somewhat wider). Seconds: the first question about a "
    "document, which also reads it, and the median of the others."
)
"""Explains the columns."""

_FACTS_IGNORED = METHOD | {
    *("context", "way", "parts", "document", "question"),
    *("key", "correct", "answer", "generated", "sources", "seconds", "peak_memory_mb"),
}
"""Fields in which the rows of one table differ: its columns and the measured fields."""


@dataclass(frozen=True, kw_only=True)
class WayScore:
    """The score of one way of reading at one length.

    Attributes:
        name: the way, for display.
        way, parts, rope, context: as in the rows.
        right: the share of right answers. `low` and `high` are its interval.
        trials: number of answers.
        first, later: seconds of the first question about a document, and of the others.
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
    """The rows of `facts`."""
    return [row for row in rows if row.get("experiment") == "facts"]


def way_scores(rows: Sequence[Row]) -> list[WayScore]:
    """The score of every length and way of one group, in the order of the rows."""
    groups: dict[tuple[int, str, int, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["context"], row["way"], row["parts"], row["rope"]), []).append(row)
    scores = []
    for (context, way, parts, rope), group in groups.items():
        right = sum(row["correct"] for row in group)
        low, high = wilson_interval(round(right), len(group))
        first = {row["document"]: row for row in reversed(group)}
        later = [row["seconds"] for row in group if row not in first.values()]
        scores.append(
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
    return sorted(scores, key=lambda score: score.context)


def facts_markdown(rows: Sequence[Row]) -> str:
    """A table for every group, with a line about the measurement above it."""
    return "\n".join(map(_facts_table, group_rows(facts_rows(rows), _FACTS_IGNORED)))


def _facts_table(rows: Sequence[Row]) -> str:
    scores, row = way_scores(rows), rows[0]
    lines = [
        f"{row['facts']} facts in {short(row['text'])}, {short(row['model'])} ({row['dtype']}, trained at "
        f"{format_length(row['trained_length'])}). {FACTS_LEGEND}",
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
    """Shares of right answers with their intervals, a bar for each way.

    Writes `out_stem`.png and .svg, `out_stem`_2 for a second group, and so on.
    """
    groups = group_rows(facts_rows(rows), _FACTS_IGNORED)
    return [
        path
        for group, stem in zip(groups, style.stems(out_stem), strict=False)
        for path in _plot_facts_group(group, stem)
    ]


def _plot_facts_group(rows: Sequence[Row], out_stem: Path) -> tuple[Path, Path]:
    scores = way_scores(rows)
    lengths = list(dict.fromkeys(score.context for score in scores))
    row = rows[0]
    title = f"Facts in a long document: {short(row['model'])} ({row['dtype']}) on {short(row['text'])}"
    with style.figure(8.5, 1.4 + 0.34 * len(scores), title) as fig:
        panels = fig.subplots(len(lengths), 1, squeeze=False)[:, 0]
        for axes, length in zip(panels, lengths, strict=True):
            bars = [score for score in scores if score.context == length][::-1]
            style.style_axes(axes, x="share of right answers", y="")
            axes.grid(axis="y", visible=False)
            axes.grid(axis="x", color=style.GRID, linewidth=0.8)
            colors = dict(zip(("cut", "whole", "parts"), style.categories(3), strict=True))
            axes.barh(range(len(bars)), [s.right for s in bars], 0.6, color=[colors[s.way] for s in bars])
            axes.hlines(range(len(bars)), [s.low for s in bars], [s.high for s in bars], color=style.INK, lw=1)
            axes.set_yticks(range(len(bars)), [s.name for s in bars])
            axes.set_xlim(0, 1)
            axes.set_title(f"{format_length(length)} tokens, {bars[0].trials} questions", loc="left", color=style.MUTED)
        note = "Bars: shares; lines: Wilson's 95% intervals. Parts are read one by one; their answers are pooled."
        fig.supxlabel(note, **style.FOOTNOTE)
        return style.save(fig, out_stem)


ENDLESS_LEGEND = (
    "Loss: nats per token in one pass, with its 95% interval. Over recomputation: this loss minus that of the "
    "untouched model, which reads the window before each token from scratch; paired on the same tokens."
)
"""Explains the columns."""

_ENDLESS_IGNORED = frozenset(
    (
        *("start", "end", "key", "loss", "low", "high", "streamed", "recomputed", "recomputed_tokens"),
        *("difference", "difference_low", "difference_high", "tokens_per_second", "cache_mb", "resident_mb"),
    )
)
"""Fields in which the rows of one table differ: its lines and the measured fields."""


def endless_rows(rows: Sequence[Row]) -> list[Row]:
    """The rows of `endless`."""
    return [row for row in rows if row.get("experiment") == "endless"]


def endless_markdown(rows: Sequence[Row]) -> str:
    """A table for every group, scaler and length."""
    lines = [ENDLESS_LEGEND]
    for group in group_rows(endless_rows(rows), _ENDLESS_IGNORED):
        row = group[0]
        lines += [
            "",
            f"`{row['rope']}`, {short(row['model'])} ({row['dtype']}, trained at "
            f"{format_length(row['trained_length'])}) on {short(row['text'])}, {row['context']:,} tokens; "
            f"{row['places']} tokens recomputed in each row",
            "",
            "| position | loss | 95% | over recomputation | 95% | cache, MB | memory, MB | tokens/s |",
            "|---:|---:|---:|---:|---:|---:|---:|---:|",
        ]
        lines += [
            f"| {row['start']:,} to {row['end']:,} "
            f"| {_number(row['loss'], '.3f')} | {_range(row['low'], row['high'], '.3f')} "
            f"| {_number(row['difference'], '+.3f')} | {_range(row['difference_low'], row['difference_high'], '+.3f')} "
            f"| {row['cache_mb']:.1f} | {row['resident_mb']:.0f} | {row['tokens_per_second']:.0f} |"
            for row in group
        ]
    return "\n".join(lines) + "\n"


def _number(value: float | None, form: str) -> str:
    return "not finite" if value is None else f"{value:{form}}"


def _range(low: float | None, high: float | None, form: str) -> str:
    return "" if low is None or high is None else f"{low:{form}} to {high:{form}}"


def plot_endless(rows: Sequence[Row], out_stem: Path) -> list[Path]:
    """Loss, and difference to recomputation, by position; a line for each scaler.

    Writes `out_stem`.png and .svg, `out_stem`_2 for a second group, and so on.
    """
    groups = group_rows(endless_rows(rows), _ENDLESS_IGNORED | METHOD | {"window", "context"})
    return [
        path
        for group, stem in zip(groups, style.stems(out_stem), strict=False)
        for path in _plot_endless_group(group, stem)
    ]


def _plot_endless_group(rows: Sequence[Row], out_stem: Path) -> tuple[Path, Path]:
    ropes = list(dict.fromkeys(row["rope"] for row in rows))
    drawn = style.line_styles(ropes)
    about = f"{short(rows[0]['model'])} ({rows[0]['dtype']}) on {short(rows[0]['text'])}"
    with style.figure(8.5, 6.2, f"An endless text: {about}") as fig:
        upper, lower = fig.subplots(2, 1, sharex=True)
        style.style_axes(upper, x="", y="loss, nats per token")
        style.style_axes(lower, x="position", y="over recomputation, nats")
        lower.axhline(0, color=style.MUTED, lw=1)
        for rope in ropes:
            longest = max(row["context"] for row in rows if row["rope"] == rope)
            line_rows = [row for row in rows if (row["rope"], row["context"]) == (rope, longest)]
            at, line = [row["end"] for row in line_rows], drawn[rope]
            options = {
                "color": line.color,
                "marker": line.marker,
                "linestyle": line.dashes,
                "lw": line.width,
                "ms": 4,
            }
            upper.plot(at, [row["loss"] for row in line_rows], label=rope, **options)
            lower.plot(at, [row["difference"] for row in line_rows], **options)
            known = [row for row in line_rows if row["difference_low"] is not None]
            lower.vlines(
                [row["end"] for row in known],
                [row["difference_low"] for row in known],
                [row["difference_high"] for row in known],
                color=line.color,
                lw=1,
            )
        ends = sorted({row["end"] for row in rows})
        for axes in (upper, lower):
            style.length_axis(axes, ends, ends[0] / 1.2, ends[-1] * 1.2)
        style.mark_length(upper, rows[0]["trained_length"], "trained length")
        upper.legend(loc="upper right", frameon=False)
        memory = max(row["cache_mb"] for row in rows)
        note = f"Each point is a bucket that ends there. The cache took at most {memory:.3g} MB."
        fig.supxlabel(note, **style.FOOTNOTE)
        return style.save(fig, out_stem)


def publisher(
    name: str,
    select: Callable[[Sequence[Row]], Sequence[Row]],
    to_markdown: Callable[[Sequence[Row]], str],
    plot: Callable[[Sequence[Row], Path], list[Path]],
) -> Callable[[Run, Sequence[Cell], Console], None]:
    """A function that a command calls after the measurement: it prints the table, and writes table
    and plot.

    Args:
        name: of the plot's files.
        select: returns the rows of a run that table and plot show.
    """

    def finish(run: Run, left_out: Sequence[Cell], console: Console) -> None:
        files = []
        if select(run.rows):
            table, markdown = run.folder / "table.md", to_markdown(run.rows)
            write_atomic(table, markdown.encode())
            console.print(Markdown(markdown))
            files = [table, *plot(run.rows, run.folder / name)]
        print_left_out(left_out, console)
        print_files(files, console)

    return finish
