"""Heat maps of scores: depth by length, or task by length, one panel for each method, all on one scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize

from ..retrieval.score import Score
from . import style

_COLOURS = colormaps["Blues"]
_DARK, _LIGHT = "#101418", "#fbfcfd"  # on the colours of cells; not those that a dark page replaces
_MOST_PANELS = 3  # side by side


@dataclass(frozen=True, kw_only=True)
class Panel:
    """The cells of one method.

    Args:
        title: above it.
        cells: scores line by line, from the top; None where nothing was measured.
        trained: columns from the left whose length is within the trained length.
    """

    title: str
    cells: Sequence[Sequence[Score | None]]
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
    """Scores of 0 to 1 in each cell's colour, and with n in its text; writes `out_stem`.png and .svg.

    Args:
        panels: one for each method.
        lines: names of the lines of every panel.
        columns: lengths, as people write them.
        y: what the lines are.
        footnote: the line below.
    """
    down = math.ceil(len(panels) / _MOST_PANELS)
    across = math.ceil(len(panels) / down)
    room = 0.085 * max(map(len, lines))  # inches for the names of the lines
    width = max(6.5, room + 1.6 + across * max(0.95 * len(columns), 1.6))
    with style.figure(width, 1.5 + down * (0.75 + 0.5 * len(lines)), title) as fig:
        grid = fig.subplots(down, across, squeeze=False, sharey=True)
        for panel, axes in zip(panels, grid.flat, strict=False):
            _draw(axes, panel, lines, columns)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for axes in grid[:, 0]:
            axes.set_ylabel(y)
        scale = ScalarMappable(Normalize(0, 1), _COLOURS)
        bar = fig.colorbar(scale, ax=grid, fraction=0.04, aspect=18, ticks=[0, 0.25, 0.5, 0.75, 1])
        bar.set_label("score")
        bar.outline.set_visible(False)
        fig.supxlabel(footnote, **style.FOOTNOTE)
        return style.save(fig, out_stem)


def _draw(axes: Axes, panel: Panel, lines: Sequence[str], columns: Sequence[str]) -> None:
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
            _write(axes, (right + 0.5, down + 0.5), cell)


def _write(axes: Axes, place: tuple[float, float], cell: Score | None) -> None:
    x, y = place
    if cell is None:
        axes.text(x, y, "not run", ha="center", va="center", fontsize=7.5, color=style.MUTED)
        return
    colour = _LIGHT if cell.mean > 0.6 else _DARK
    axes.text(x, y - 0.02, f"{cell.mean:.2f}", ha="center", va="bottom", fontsize=9.5, color=colour)
    axes.text(x, y + 0.06, f"n={cell.trials}", ha="center", va="top", fontsize=7.5, color=colour)
