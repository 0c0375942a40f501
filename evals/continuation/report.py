"""Tables and the plot of the continuation benchmark."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from rich.table import Column, Table

from ..reports import style
from ..runs.result import Row
from ..statistics import block_interval, paired_difference, score_interval
from .methods import EXACT

OVER_EXACT = "over_exact"
COLUMNS = {
    "next_byte_bits": "next byte",
    OVER_EXACT: "over exact",
    "top1": "top-1",
    "finished": "finished",
    "bits_per_byte": "8 bytes",
    "extra_forwards": "runs",
    "extra_ms": "ms",
}

SHARES = ("top1", "finished")

LEGEND = (
    "Next byte: its bits; over exact: bits minus those of the exact method, cut by cut; top-1: share of cuts where it "
    "is the likeliest; finished: share of cuts where the likeliest text completes the cut token; 8 bytes: bits per "
    "byte of the next 8; runs, ms: model runs and time up to the first token, minus those of off. Means over cuts "
    "with 95% intervals; ms is a median."
)
"""Explains the columns."""


@dataclass(frozen=True, kw_only=True)
class Value:
    """A mean over cuts with its 95% interval. The bounds are NaN for a median or too few cuts."""

    mean: float
    low: float = math.nan
    high: float = math.nan

    def __str__(self) -> str:
        return f"{self.mean:.2f}" + ("" if math.isnan(self.low) else f" ±{(self.high - self.low) / 2:.2f}")


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The results of one method on one kind of cuts in one text.

    Attributes:
        name: of the text and the kind of cuts.
        method: one of `methods.METHODS`.
        cuts: number of cuts.
        values: by field of `COLUMNS`; only the fields that were measured. `over_exact` is the
            difference of the next byte's bits to the exact method, paired cut by cut. `extra_ms` is
            a median.
    """

    name: str
    method: str
    cuts: int
    values: dict[str, Value]


def summarize(rows: Sequence[Row]) -> list[Summary]:
    """A summary for each text, kind of cut and method, in the order of the rows."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((f"{Path(row['text']).name}, {row['kind']}", row["method"]), []).append(row)
    return [
        Summary(name=name, method=method, cuts=len(group), values=_values(group, groups[name, EXACT]))
        for (name, method), group in groups.items()
    ]


def _values(rows: Sequence[Row], exact: Sequence[Row]) -> dict[str, Value]:
    values = {}
    for field in COLUMNS:
        if field == OVER_EXACT and "next_byte_bits" in rows[0]:
            mean, low, high = paired_difference(
                _numbers(rows, "next_byte_bits"), _numbers(exact, "next_byte_bits"), block=1
            )
            values[field] = Value(mean=mean, low=low, high=high)
        elif field == "extra_ms" and field in rows[0]:
            values[field] = Value(mean=float(np.median(_numbers(rows, field))))
        elif field in rows[0]:
            numbers = _numbers(rows, field)
            low, high = score_interval(numbers.tolist()) if field in SHARES else block_interval(numbers, block=1)
            values[field] = Value(mean=float(numbers.mean()), low=low, high=high)
    return values


def _numbers(rows: Sequence[Row], field: str) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.array([row[field] for row in rows], dtype=np.float64)


def tables(summaries: Sequence[Summary]) -> list[Table]:
    """Tables for the terminal, one for each text and kind of cuts."""
    tables_by_text = []
    for name, group in _by_name(summaries).items():
        table = Table(Column("method", no_wrap=True), *COLUMNS.values(), title=f"{name}: {group[0].cuts} cuts")
        for summary in group:
            table.add_row(summary.method, *_cells(summary))
        tables_by_text.append(table)
    return tables_by_text


def to_markdown(summaries: Sequence[Summary], model: str) -> str:
    """The same tables as Markdown."""
    lines = [f"Methods to continue prompts that are cut off anywhere, with {model}. {LEGEND}"]
    for name, group in _by_name(summaries).items():
        lines += ["", f"{name}: {group[0].cuts} cuts", "", f"| method | {' | '.join(COLUMNS.values())} |"]
        lines.append("|---" * (1 + len(COLUMNS)) + "|")
        lines += [f"| {summary.method} | {' | '.join(_cells(summary))} |" for summary in group]
    return "\n".join(lines) + "\n"


def _by_name(summaries: Sequence[Summary]) -> dict[str, list[Summary]]:
    groups: dict[str, list[Summary]] = {}
    for summary in summaries:
        groups.setdefault(summary.name, []).append(summary)
    return groups


def _cells(summary: Summary) -> list[str]:
    return [str(summary.values[field]) if field in summary.values else "" for field in COLUMNS]


_PANELS = {"next_byte_bits": "next-byte bits (less is better)", "finished": "share of cut tokens completed"}
_WIDTH = 0.8  # width of a group of bars; groups have the distance 1


def plot_continuation(summaries: Sequence[Summary], model: str, out_stem: Path) -> tuple[Path, Path]:
    """Bars with 95% intervals. Writes `out_stem`.png and .svg, and returns their paths."""
    with style.figure(9, 7.2, f"Prompts cut inside tokens: {model}") as fig:
        panels = fig.subplots(len(_PANELS), 1, sharex=True)
        for axes, field in zip(panels, _PANELS, strict=True):
            _draw(axes, summaries, field)
        handles, labels = panels[-1].get_legend_handles_labels()
        above = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0}
        panels[0].legend(handles, labels, ncols=len(labels), frameon=False, **above)
        note = "Bars: means over cuts; lines: 95% intervals. Of transformers' healing only the text is known."
        fig.supxlabel(note, **style.FOOTNOTE)
        return style.save(fig, out_stem)


def _draw(axes: Axes, summaries: Sequence[Summary], field: str) -> None:
    names = list(dict.fromkeys(summary.name for summary in summaries))
    methods = list(dict.fromkeys(summary.method for summary in summaries))
    style.style_axes(axes, x="", y=_PANELS[field])
    axes.set_xticks(range(len(names)), [_label(name, summaries) for name in names])
    axes.tick_params(axis="x", length=0)
    colors = dict(zip(methods, style.categories(len(methods)), strict=True))
    for method in methods:
        drawn = [s for s in summaries if s.method == method and field in s.values]
        step = (methods.index(method) - (len(methods) - 1) / 2) * _WIDTH / len(methods)
        places = [names.index(s.name) + step for s in drawn]
        values = [s.values[field] for s in drawn]
        axes.bar(places, [v.mean for v in values], 0.9 * _WIDTH / len(methods), color=colors[method], label=method)
        known = [(x, v) for x, v in zip(places, values, strict=True) if not math.isnan(v.low)]
        axes.vlines([x for x, _ in known], [v.low for _, v in known], [v.high for _, v in known], color=style.INK, lw=1)
    axes.set_ylim(bottom=0)


def _label(name: str, summaries: Sequence[Summary]) -> str:
    text, _, kind = name.partition(", ")
    cuts = next(s.cuts for s in summaries if s.name == name)
    return f"{text}\n{textwrap.fill(kind, 16)}\n({cuts} cuts)"
