"""How every plot looks: colours, axes, labels, and files that come out the same each time."""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.transforms import ScaledTranslation

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
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#3a9bdc", "#8c6bb1", "#8b5a2b", "#7f7f7f")
_MARKERS = "osDvPXp*"  # an upward triangle means "off the scale"

# A method has the same colour in every plot; several specs of one method are shades of it.
_COLOUR_OF_METHOD = {
    **dict.fromkeys(("yarn", "dynamic-yarn"), 0),
    **dict.fromkeys(("self-extend", "auto"), 1),
    **dict.fromkeys(("rerope", "leaky-rerope"), 2),
    **dict.fromkeys(("ntk", "dynamic-ntk"), 3),
    **dict.fromkeys(("ntk-mixed", "ntk-fixed", "ntk-by-parts"), 4),
    **dict.fromkeys(("longrope", "mrrope", "critical-base", "base", "base-bound", "alpharope", "sink-window"), 5),
    **dict.fromkeys(("dual-chunk", "string", "jet-long"), 6),
    **dict.fromkeys(("linear", "llama3"), 7),
}
_OTHER_METHOD = len(_COLOURS) - 1
_SHADES = (0.0, 0.45, -0.4)  # towards white, or towards black

WIDTH = 5.4
"""Inches of a plot of one panel: its text of 10 points has 9 pixels on a page of 400."""

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


_PIXELS = 1800  # across a PNG


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
        letters = round(9 * width)  # that a line of the title has room for
        fig.suptitle(textwrap.fill(title, letters), x=0.012, ha="left", fontsize=12, fontweight="bold")
        yield fig


def save(fig: Figure, out_stem: Path) -> tuple[Path, Path]:
    """Write `out_stem`.png and `out_stem`.svg, the same bytes for the same figure; returns both
    paths."""
    png, svg = (Path(out_stem).with_name(f"{Path(out_stem).name}.{kind}") for kind in ("png", "svg"))
    for path, kind in ((svg, "svg"), (png, "png")):
        buffer = io.BytesIO()
        fig.savefig(
            buffer, format=kind, dpi=_PIXELS / fig.get_figwidth(), metadata={"Date": None} if kind == "svg" else {}
        )
        write_atomic(path, buffer.getvalue())
        fig.set_layout_engine("none")  # the layout is that of the first file; to compute it takes as long as to draw
    return png, svg


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


LOGN_DASHES = (0, (1.5, 1.0))
"""The dashes of a method with log n, whatever the method."""

_UNTOUCHED_DASHES = (0, (4, 2))


def line_styles(ropes: Sequence[str]) -> dict[str, LineStyle]:
    """A style for each rope spec. The colour says which method, dots say log n, the untouched model is dark and
    dashed.

    Specs of one method are shades of its colour, and differ in the marker. One spec with and without log n has one
    colour.
    """
    bases = list(dict.fromkeys(map(_without_logn, ropes)))
    colours = _colours([base for base in bases if base != UNTOUCHED])
    markers = _markers(colours)
    styles = {}
    for rope in ropes:
        base = _without_logn(rope)
        has_logn = base != rope
        if base == UNTOUCHED:
            dashes = LOGN_DASHES if has_logn else _UNTOUCHED_DASHES
            styles[rope] = LineStyle(color=INK, marker="o", dashes=dashes)
        else:
            look = LineStyle(color=colours[base], marker=markers[base])
            styles[rope] = replace(look, dashes=LOGN_DASHES) if has_logn else look
    return styles


def series_styles(names: Sequence[str]) -> dict[str, LineStyle]:
    """A style for each thing that is no method of scaling, such as the bands of one; the untouched model as
    always."""
    others = [name for name in names if name != UNTOUCHED]
    colours = dict(zip(others, itertools.cycle(_COLOURS), strict=False))
    markers = dict(zip(others, itertools.cycle(_MARKERS), strict=False))
    untouched = LineStyle(color=INK, marker="o", dashes=_UNTOUCHED_DASHES)
    return {
        name: untouched if name == UNTOUCHED else LineStyle(color=colours[name], marker=markers[name]) for name in names
    }


def _without_logn(rope: str) -> str:
    parts = [part for part in rope.split("|") if part.partition(":")[0] != "logn"]
    return "|".join(parts) or UNTOUCHED


def _colours(bases: Sequence[str]) -> dict[str, str]:
    """The colour of each method, and shades of it for its further specs."""
    counts: Counter[int] = Counter()
    colours = {}
    for base in bases:
        index = _COLOUR_OF_METHOD.get(base.partition(":")[0].partition("|")[0], _OTHER_METHOD)
        colours[base] = _shade(_COLOURS[index], _SHADES[counts[index] % len(_SHADES)])
        counts[index] += 1
    return colours


def _markers(colours: Mapping[str, str]) -> dict[str, str]:
    """A marker for each method, another one for each of those that share a colour."""
    markers: dict[str, str] = {}
    for place, (base, color) in enumerate(colours.items()):
        taken = {markers[other] for other in markers if colours[other] == color}
        order = [_MARKERS[(place + step) % len(_MARKERS)] for step in range(len(_MARKERS))]
        markers[base] = next((marker for marker in order if marker not in taken), order[0])
    return markers


def _shade(color: str, towards_white: float) -> str:
    end = 1.0 if towards_white > 0 else 0.0
    red, green, blue = (part + abs(towards_white) * (end - part) for part in to_rgb(color))
    return to_hex((red, green, blue))


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


def mark_length(axes: Axes, length: int, label: str, *, above: bool = False) -> None:
    """A dotted vertical line at `length` with its name at its foot, or above the panel, on the side that has room.
    Nothing if the axis ends before it."""
    left, right = axes.get_xlim()
    if not left < length < right:
        return
    axes.axvline(length, color=MUTED, linewidth=1.1, linestyle=":", zorder=1)
    is_right = math.log(length / left) > 0.6 * math.log(right / left)
    axes.annotate(
        label,
        (length, 1 if above else 0),
        xycoords=axes.get_xaxis_transform(),
        xytext=(-4 if is_right else 4, 3 if above else 5),
        textcoords="offset points",
        ha="right" if is_right else "left",
        color=MUTED,
        fontsize=9,
        bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 1, "alpha": 0.8},
    )


def footnote(fig: Figure, text: str) -> None:
    """The lines below a plot that say what was measured."""
    fig.supxlabel(textwrap.fill(text, round(15 * fig.get_figwidth())), **FOOTNOTE)


def legend_below(axes: Axes, labels: Mapping[str, str], looks: Mapping[str, LineStyle]) -> None:
    """The name and the last value of every line, one below the other under the axes: no two can touch.

    Args:
        labels: by method, in the order from the top.
        looks: their styles.
    """
    handles = [
        Line2D([], [], color=looks[name].color, ls=looks[name].dashes, lw=looks[name].width, marker=looks[name].marker)
        for name in labels
    ]
    figure_of_axes = axes.get_figure(root=True)
    assert figure_of_axes is not None
    below = axes.transAxes + ScaledTranslation(0, -0.56, figure_of_axes.dpi_scale_trans)
    axes.legend(
        handles,
        labels.values(),
        loc="upper left",
        bbox_to_anchor=(0, 0),
        bbox_transform=below,
        borderaxespad=0,
        handlelength=3.2,
        labelspacing=0.35,
        frameon=False,
    )


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A value with its interval (NaN where there is none), and its text."""

    value: float
    low: float
    high: float
    text: str


def draw_bars(axes: Axes, bars: Mapping[str, Bar], looks: Mapping[str, LineStyle], x: str) -> None:
    """A horizontal bar for each method, from zero, with its name and text above it.

    Args:
        x: what the values are.
    """
    style_axes(axes, x=x, y="")
    axes.grid(visible=False, axis="y")
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.axvline(0, color=INK, linewidth=0.9)
    for row, (name, bar) in enumerate(bars.items()):
        look = looks[name]
        hatch = "////" if look.dashes == LOGN_DASHES else None
        axes.barh(row, bar.value, 0.36, color=look.color, alpha=0.85, hatch=hatch, edgecolor=PAPER, linewidth=0)
        axes.hlines(row, bar.low, bar.high, color=INK, lw=1.3)
        axes.annotate(
            f"{name}  {bar.text}",
            (0, row - 0.26),
            xycoords=axes.get_yaxis_transform(),
            xytext=(3, 0),
            textcoords="offset points",
            va="bottom",
            fontsize=9.5,
        )
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_ylim(len(bars) - 0.6, -0.75)


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
