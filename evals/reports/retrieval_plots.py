"""Plots of retrieval rows: heat maps, and scores against length."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize

from ...scaling import format_length
from ..retrieval.score import ScoreGroup, TrialScore, score_groups
from ..runs.result import Run
from . import style


def plot_retrieval(run: Run) -> list[Path]:
    """Every retrieval plot of a run into its folder; returns the PNG and SVG files.

    `passkey_heat` and `passkey_curve` for the suite `passkey`, and so on (no curve while no length
    has every task); further groups of the same suite are `passkey_heat_2` and so on.
    """
    paths: list[Path] = []
    taken: Counter[str] = Counter()
    for group in score_groups(run.rows):
        taken[group.suite] += 1
        number = f"_{taken[group.suite]}" if taken[group.suite] > 1 else ""
        stem = run.folder / group.suite.replace("-", "_")
        paths += plot_heat(group, stem.with_name(f"{stem.name}_heat{number}"))
        if any(map(group.scores, group.methods)):
            paths += plot_curve(group, stem.with_name(f"{stem.name}_curve{number}"))
    return paths


def plot_heat(group: ScoreGroup, out_stem: Path) -> tuple[Path, Path]:
    """Depth by length, or task by length where the seed chose the depths; a panel for each
    method."""
    by_depth = bool(group.depths)
    if by_depth:
        lines = [f"{depth:g}" for depth in group.depths]
        picks: list[dict[str, Any]] = [{"depth": depth} for depth in group.depths]
    else:
        lines, picks = group.tasks, [{"task": task} for task in group.tasks]
    trained = bisect_right(group.lengths, group.trained_length)
    panels = [
        Panel(
            title=rope,
            cells=[[group.score(rope, length, **pick) for length in group.lengths] for pick in picks],
            trained=trained,
        )
        for rope in group.methods
    ]
    dotted = "Dotted line:" if 0 < trained < len(group.lengths) else "Within" if trained else "Beyond"
    note = f"{dotted} the trained length {format_length(group.trained_length)}."
    return plot_heat_maps(
        panels,
        out_stem,
        title=f"{group.name}: {group.measured_on}",
        lines=lines,
        columns=[format_length(length) for length in group.lengths],
        y="depth of the needle" if by_depth else "",
        footnote=f"Share of right answers of n trials.{group.chance_note} {note}",
    )


def plot_curve(group: ScoreGroup, out_stem: Path) -> tuple[Path, Path]:
    """Right answers against length, a line with 95% intervals for each method, and the trained
    length."""
    curves = {rope: scores for rope in group.methods if (scores := group.scores(rope))}
    looks = style.line_styles(list(curves))
    each = ", all tasks counting alike" if len(group.tasks) > 1 else ", all depths together"
    fewest = min(score.trials for scores in curves.values() for score in scores.values())
    note = f"95% intervals of {fewest} trials or more a point{each}.{group.chance_note}"
    title = f"{group.name}: {group.measured_on}"
    if len(group.lengths) == 1:
        (length,) = group.lengths
        bars = {rope: _bar(scores[length]) for rope, scores in curves.items()}
        with style.figure(style.WIDTH, 1.6 + 0.5 * len(bars), title) as fig:
            axes = fig.add_subplot()
            style.draw_bars(axes, bars, looks, f"right answers at {format_length(length)}")
            axes.set_xlim(0, 1.03)
            axes.set_xticks(_SHARES, _SHARE_NAMES)
            style.footnote(fig, f"Lines: {note}")
            return style.save(fig, out_stem)
    with style.figure(style.WIDTH, 3.9 + 0.2 * len(curves), title) as fig:
        axes = fig.add_subplot()
        style.style_axes(axes, x="length (tokens)", y="right answers")
        lengths = group.lengths
        ends = (min(*lengths, group.trained_length) / 1.15, max(*lengths, 1.4 * group.trained_length) * 1.15)
        style.length_axis(axes, [*lengths], *ends)
        axes.set_ylim(-0.03, 1.03)
        axes.set_yticks(_SHARES, _SHARE_NAMES)
        label = f"trained length {format_length(group.trained_length)}"
        style.mark_length(axes, group.trained_length, label, above=True)  # curves lie at 0% and at 100%
        _draw_curves(axes, curves, looks)
        style.footnote(fig, f"Shaded: {note}")
        return style.save(fig, out_stem)


_SHARES, _SHARE_NAMES = (0, 0.25, 0.5, 0.75, 1), ("0%", "25%", "50%", "75%", "100%")


def _bar(score: TrialScore) -> style.Bar:
    return style.Bar(value=score.mean, low=score.low, high=score.high, text=f"{score.mean:.0%}")


def _draw_curves(
    axes: Axes, curves: Mapping[str, Mapping[int, TrialScore]], looks: Mapping[str, style.LineStyle]
) -> None:
    furthest = max(length for scores in curves.values() for length in scores)
    labels: dict[str, tuple[float, str]] = {}
    for rope, scores in curves.items():
        look, points = looks[rope], [(length, scores[length]) for length in sorted(scores)]
        xs, means = [length for length, _ in points], [score.mean for _, score in points]
        lows, highs = [score.low for _, score in points], [score.high for _, score in points]
        axes.fill_between(xs, lows, highs, color=look.color, alpha=0.13, lw=0)
        if len(points) == 1:  # nothing to shade between
            axes.vlines(xs, lows, highs, color=look.color, alpha=0.35, lw=5)
        axes.plot(xs, means, color=look.color, ls=look.dashes, lw=look.width, marker=look.marker, ms=5, zorder=3)
        early = "" if xs[-1] == furthest else f" at {format_length(xs[-1])}"
        labels[rope] = (means[-1], f"{rope}  {means[-1]:.0%}{early}")
    best_first = sorted(labels, key=lambda rope: -labels[rope][0])
    style.legend_below(axes, {rope: labels[rope][1] for rope in best_first}, looks)


_COLOURS = colormaps["Blues"]
_DARK, _LIGHT = "#101418", "#fbfcfd"  # on the colours of cells; not those that a dark page replaces
_COLUMN = 0.62  # inches of a column, whose cells have two lines of text
_LETTER = 0.085  # inches of a letter of a name


@dataclass(frozen=True, kw_only=True)
class Panel:
    """The cells of one method.

    Args:
        title: above it.
        cells: scores line by line, from the top; None where nothing was measured.
        trained: columns from the left whose length is within the trained length.
    """

    title: str
    cells: Sequence[Sequence[TrialScore | None]]
    trained: int


def plot_heat_maps(
    panels: Sequence[Panel],
    out_stem: Path,
    *,
    title: str,
    lines: Sequence[str],
    columns: Sequence[str],
    y: str,
    footnote: str,
) -> tuple[Path, Path]:
    """Scores of 0 to 1 in each cell's colour, and with n in its text; writes `out_stem`.png and
    .svg.

    Args:
        panels: one for each method.
        lines: names of the lines of every panel.
        columns: lengths, as people write them.
        y: what the lines are.
        footnote: the line below.
    """
    room = 1.1 + _LETTER * max(map(len, lines))  # inches for the names of the lines and the bar of colours
    panel_width = max(_COLUMN * len(columns), _LETTER * max(len(panel.title) for panel in panels))
    most = max(1, int((style.WIDTH - room) / panel_width))  # side by side; text that has to shrink cannot be read
    down = math.ceil(len(panels) / most)
    across = math.ceil(len(panels) / down)
    width = max(style.WIDTH, room + across * panel_width)
    with style.figure(width, 1.3 + down * (0.75 + 0.42 * len(lines)), title) as fig:
        grid = fig.subplots(down, across, squeeze=False, sharey=True)
        for panel, axes in zip(panels, grid.flat, strict=False):
            _draw_panel(axes, panel, lines, columns)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for axes in grid[:, 0]:
            axes.set_ylabel(y)
        scale = ScalarMappable(Normalize(0, 1), _COLOURS)
        bar = fig.colorbar(scale, ax=grid, fraction=0.04, aspect=18 * down, ticks=[0, 0.25, 0.5, 0.75, 1])
        bar.set_label("score")
        bar.outline.set_visible(False)
        style.footnote(fig, footnote)
        return style.save(fig, out_stem)


def _draw_panel(axes: Axes, panel: Panel, lines: Sequence[str], columns: Sequence[str]) -> None:
    values = np.array([[math.nan if cell is None else cell.mean for cell in cells] for cells in panel.cells])
    axes.pcolormesh(values, cmap=_COLOURS, vmin=0, vmax=1, edgecolors=style.PAPER, linewidth=1.5)
    axes.set_xticks([n + 0.5 for n in range(len(columns))], columns)
    axes.set_yticks([n + 0.5 for n in range(len(lines))], lines)
    axes.set_ylim(len(lines), 0)
    axes.tick_params(length=0, labelcolor=style.INK)
    axes.spines[:].set_visible(False)
    axes.set_title(panel.title, loc="left")
    axes.set_xlabel("length (tokens)")
    if 0 < panel.trained < len(columns):
        axes.axvline(panel.trained, color=_DARK, linewidth=1.4, linestyle=":")
    for down, cells in enumerate(panel.cells):
        for right, cell in enumerate(cells):
            _write_cell(axes, (right + 0.5, down + 0.5), cell)


def _write_cell(axes: Axes, place: tuple[float, float], cell: TrialScore | None) -> None:
    x, y = place
    if cell is None:
        axes.text(x, y, "not run", ha="center", va="center", fontsize=7.5, color=style.MUTED)
        return
    colour = _LIGHT if cell.mean > 0.6 else _DARK
    axes.text(x, y - 0.02, f"{cell.mean:.2f}", ha="center", va="bottom", fontsize=9.5, color=colour)
    axes.text(x, y + 0.06, f"n={cell.trials}", ha="center", va="top", fontsize=7.5, color=colour)
