"""How every plot looks: colours, axes, labels, and files that come out the same each time."""

from __future__ import annotations

import contextlib
import io
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from ...engine.storage import write_atomic
from ...scaling import format_length
from ..runs.compare import UNTOUCHED

INK = "#1f2328"
MUTED = "#656d76"
GRID = "#e3e6ea"
PAPER = "#ffffff"
"""The four colours that the report's style sheet replaces on a dark page."""

# Told apart with any colour vision (Okabe and Ito, with yellow and sky blue darkened so that thin lines
# show on white as well as on black).
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#3a9bdc", "#8c6bb1", "#7f7f7f")
_MARKERS = "osDvPXp*"  # an upward triangle means "off the scale"

# A method keeps its colour from plot to plot; methods that are rarely drawn together share one.
_COLOUR_OF_METHOD = {
    **dict.fromkeys(("yarn", "dynamic-yarn", "self-extend"), 0),
    **dict.fromkeys(("linear", "llama3", "dual-chunk"), 1),
    **dict.fromkeys(("rerope", "leaky-rerope", "ntk-by-parts"), 2),
    **dict.fromkeys(("ntk", "dynamic-ntk"), 3),
    **dict.fromkeys(("ntk-mixed", "ntk-fixed"), 4),
    **dict.fromkeys(("longrope", "critical-base", "mrrope"), 5),
    **dict.fromkeys(("base", "base-bound", "alpharope"), 6),
}

_SETTINGS: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.labelsize": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.unicode_minus": True,
    "svg.fonttype": "none",  # text stays text: small files, selectable, read aloud
    "svg.hashsalt": "ropewalk",
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "savefig.facecolor": PAPER,
}


FOOTNOTE: dict[str, Any] = {"x": 0.012, "ha": "left", "fontsize": 8.5, "color": MUTED}
"""Options of `Figure.supxlabel` for the line below a plot that says what was measured."""


@dataclass(frozen=True, kw_only=True)
class LineStyle:
    """How one method is drawn."""

    color: str
    marker: str
    dashes: str | tuple[int, tuple[float, ...]] = "-"
    width: float = 1.9


@contextlib.contextmanager
def figure(width: float, height: float, title: str) -> Iterator[Figure]:
    """A figure of `width` x `height` inches with its title; draw and save it inside the block."""
    with matplotlib.rc_context(_SETTINGS):
        fig = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
        fig.suptitle(title, x=0.012, ha="left", fontsize=12, fontweight="bold")
        yield fig


def save(fig: Figure, out_stem: Path) -> tuple[Path, Path]:
    """Write `out_stem`.png and `out_stem`.svg, the same bytes for the same figure; returns both
    paths."""
    paths = []
    for kind in ("png", "svg"):
        path = Path(out_stem).with_name(f"{Path(out_stem).name}.{kind}")
        buffer = io.BytesIO()
        fig.savefig(buffer, format=kind, dpi=200, metadata={"Date": None} if kind == "svg" else {})
        write_atomic(path, buffer.getvalue())
        paths.append(path)
    return paths[0], paths[1]


def stems(first: Path) -> Iterator[Path]:
    """`first`, then `first`_2 and so on, for the plots of further settings."""
    yield first
    yield from (first.with_name(f"{first.name}_{number}") for number in itertools.count(2))


def style_axes(axes: Axes, *, x: str, y: str) -> None:
    """Names of the axes, light grid, no box."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(which="both", color=MUTED, labelcolor=INK)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def line_styles(ropes: Sequence[str]) -> dict[str, LineStyle]:
    """A style for each rope spec: the untouched model dark and dashed, no two others of one colour
    while colours last; after that dashes tell them apart."""
    styles: dict[str, LineStyle] = {}
    used: list[int] = []
    for rope in ropes:
        if rope == UNTOUCHED:
            styles[rope] = LineStyle(color=INK, marker="o", dashes=(0, (4, 2)))
            continue
        first_choice = _COLOUR_OF_METHOD.get(rope.partition(":")[0].partition("|")[0], 0)
        order = [(first_choice + step) % len(_COLOURS) for step in range(len(_COLOURS))]
        index = min(order, key=used.count)
        styles[rope] = LineStyle(
            color=_COLOURS[index],
            marker=_MARKERS[len(used) % len(_MARKERS)],
            dashes="-" if used.count(index) == 0 else (0, (1.5, 1)),
        )
        used.append(index)
    return styles


def categories(count: int) -> list[str]:
    """Colours for things that are not methods of scaling: the first a quiet one, for what the
    others improve on."""
    return [MUTED, *(_COLOURS[index % len(_COLOURS)] for index in range(count - 1))]


def length_axis(axes: Axes, ticks: Sequence[int], low: float, high: float) -> None:
    """A log2 axis of lengths with `ticks` labelled as 2k, 4k, 8k where there is room.

    Powers of two win over their neighbours.
    """
    axes.set_xscale("log", base=2)
    axes.set_xlim(low, high)
    labelled: list[int] = []
    for tick in sorted(ticks, key=lambda t: (t & (t - 1) != 0, t)):
        room = (high / low) ** 0.06
        if all(max(tick / other, other / tick) > room for other in labelled):
            labelled.append(tick)
    axes.set_xticks(sorted(labelled), [format_length(tick) for tick in sorted(labelled)])
    axes.set_xticks([], minor=True)


def mark_length(axes: Axes, length: int, label: str) -> None:
    """A dotted vertical line at `length` with its name along it."""
    axes.axvline(length, color=MUTED, linewidth=1.1, linestyle=":", zorder=1)
    axes.annotate(
        label,
        (length, 0),
        xycoords=axes.get_xaxis_transform(),
        xytext=(4, 5),
        textcoords="offset points",
        color=MUTED,
        fontsize=9,
    )


def spread(desired: Sequence[float], gap: float) -> list[float]:
    """Places as near to `desired` as they can be while at least `gap` apart and in the same order.

    Places that collide form a block around the mean of what its members want.
    """
    order = sorted(range(len(desired)), key=lambda index: desired[index])
    blocks: list[list[int]] = []
    for index in order:
        blocks.append([index])
        while len(blocks) > 1 and _start(blocks[-1], desired, gap) < (
            _start(blocks[-2], desired, gap) + len(blocks[-2]) * gap
        ):
            last = blocks.pop()
            blocks[-1] += last
    places = [0.0] * len(desired)
    for block in blocks:
        for step, index in enumerate(block):
            places[index] = _start(block, desired, gap) + step * gap
    return places


def _start(block: Sequence[int], desired: Sequence[float], gap: float) -> float:
    return sum(desired[index] - step * gap for step, index in enumerate(block)) / len(block)
