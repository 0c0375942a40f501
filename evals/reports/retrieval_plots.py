"""Plots of retrieval: heat maps for each setting, and the scores of all methods against length."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from ...scaling import format_length
from ..retrieval.score import ScoreGroup, settings
from ..runs.result import Run
from . import style
from .heat_map import Panel, plot_heat_maps

_LABEL = 0.06  # height of a label at the end of a curve as a share of the axes


def plot_retrieval(run: Run) -> list[Path]:
    """Every retrieval plot of a run into its folder; returns the PNG and SVG files.

    `passkey_heat` and `passkey_curve` for the suite `passkey`, and so on (no curve while no length has every task);
    further settings of the same suite are `passkey_heat_2` and so on.
    """
    paths: list[Path] = []
    taken: Counter[str] = Counter()
    for setting in settings(run.rows):
        taken[setting.suite] += 1
        number = f"_{taken[setting.suite]}" if taken[setting.suite] > 1 else ""
        stem = run.folder / setting.suite.replace("-", "_")
        paths += plot_heat(setting, stem.with_name(f"{stem.name}_heat{number}"))
        if any(map(setting.scores, setting.methods)):
            paths += plot_curve(setting, stem.with_name(f"{stem.name}_curve{number}"))
    return paths


def plot_heat(setting: ScoreGroup, out_stem: Path) -> tuple[Path, Path]:
    """Depth by length, or task by length where the seed chose the depths; a panel for each method."""
    by_depth = bool(setting.depths)
    if by_depth:
        lines = [f"{depth:g}" for depth in setting.depths]
        picks: list[dict[str, Any]] = [{"depth": depth} for depth in setting.depths]
    else:
        lines, picks = setting.tasks, [{"task": task} for task in setting.tasks]
    trained = bisect_right(setting.lengths, setting.trained_length)
    panels = [
        Panel(
            title=rope,
            cells=[[setting.score(rope, length, **pick) for length in setting.lengths] for pick in picks],
            trained=trained,
        )
        for rope in setting.methods
    ]
    dotted = "Dotted line:" if 0 < trained < len(setting.lengths) else "Within" if trained else "Beyond"
    note = f"{dotted} the trained length {format_length(setting.trained_length)}."
    return plot_heat_maps(
        panels,
        out_stem,
        title=f"{setting.name}: {setting.measured_on}",
        lines=lines,
        columns=[format_length(length) for length in setting.lengths],
        y="depth of the needle" if by_depth else "",
        footnote=f"Share of right answers of n trials. {note}",
    )


def plot_curve(setting: ScoreGroup, out_stem: Path) -> tuple[Path, Path]:
    """Right answers against length, a line with 95% intervals for each method, and the trained length."""
    lengths = setting.lengths
    each = ", all tasks counting alike" if len(setting.tasks) > 1 else ", all depths together"
    with style.figure(8, 4.6, f"{setting.name}: {setting.measured_on}") as fig:
        axes = fig.add_subplot()
        style.style_axes(axes, x="length (tokens)", y="right answers")
        ends = (min(*lengths, setting.trained_length) / 1.15, max(*lengths, 1.4 * setting.trained_length) * 1.15)
        style.length_axis(axes, [*lengths], *ends)
        axes.set_ylim(-0.03, 1.03)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
        style.mark_length(axes, setting.trained_length, f"trained length {format_length(setting.trained_length)}")
        _lines(axes, setting)
        fewest = min(own.trials for rope in setting.methods for own in setting.scores(rope).values())
        fig.supxlabel(f"Shaded: 95% intervals of {fewest} trials or more a point{each}.", **style.FOOTNOTE)
        return style.save(fig, out_stem)


def _lines(axes: Axes, setting: ScoreGroup) -> None:
    curves = {rope: scores for rope in setting.methods if (scores := setting.scores(rope))}
    looks = style.line_styles(list(curves))
    ends = []
    for rope, scores in curves.items():
        look, points = looks[rope], [(length, scores[length]) for length in sorted(scores)]
        xs, means = [length for length, _ in points], [own.mean for _, own in points]
        lows, highs = [own.low for _, own in points], [own.high for _, own in points]
        axes.fill_between(xs, lows, highs, color=look.color, alpha=0.13, lw=0)
        if len(points) == 1:  # nothing to shade between
            axes.vlines(xs, lows, highs, color=look.color, alpha=0.35, lw=5)
        axes.plot(xs, means, color=look.color, ls=look.dashes, lw=look.width, marker=look.marker, ms=5, zorder=3)
        early = "" if xs[-1] == setting.lengths[-1] else f" at {format_length(xs[-1])}"
        ends.append((means[-1], f"{rope}  {means[-1]:.0%}{early}", look.color))
    places = style.spread([end for end, _, _ in ends], _LABEL)
    for (_, label, colour), place in zip(ends, places, strict=True):
        axes.annotate(
            label,
            (1.0, place),
            xycoords=axes.get_yaxis_transform(),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            fontsize=9.5,
            color=colour,
            annotation_clip=False,
        )
