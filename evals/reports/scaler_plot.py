"""What a scaler does, drawn and in short: wavelengths, stretch and long-range decay; distances;
temperature."""

from __future__ import annotations

import itertools
import math
import textwrap
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec

from ...errors import ConfigError
from ...scaling import RopeSpec, Scaler, compose, format_length
from ...scaling.rope import Facet
from ..runs.compare import UNTOUCHED
from . import style
from .distance_plot import distances_seen, draw_distances, draw_map, legend_above, length_ticks, mark_levels

Array = np.ndarray[tuple[int], np.dtype[np.float64]]

Curves = dict[str, Array]
Looks = dict[str, style.LineStyle]

_BINS = 320
_PER_BIN = 2048
_TITLE, _LEGEND, _FOOTNOTE = 74, 24, 138  # letters that there is room for
_HEIGHTS = {"frequencies": (3.2, 3.3), "positions": (3.7,), "temperature": (2.5,)}  # inches of every row of panels


def facets_drawn(scaler: Scaler) -> list[str]:
    """The facets that have panels: those that the scaler sets; the frequencies of the untouched
    model."""
    drawn = []
    if scaler.member("frequencies") or scaler.member("wavelength grid"):
        drawn.append("frequencies")
    drawn += [facet for facet in ("positions", "temperature") if scaler.member(facet)]
    return drawn or ["frequencies"]


def plot_scaler(scaler: Scaler, rope: RopeSpec, length: int, out_stem: Path) -> tuple[Path, Path]:
    """Panels for every facet that the scaler sets; writes `out_stem`.png and .svg and returns their
    paths.

    Frequencies, plain against scaled:

    * wavelength 2 pi / w_i of every pair, with the trained length and `length`;
    * stretch lambda_i = theta_i / w_i of every pair;
    * long-range decay f(m) = sum_i cos(m w_i) against distance m, mean and range over each step of m.
      Where it is below zero, a similar token that far away is scored below a random one (arXiv 2405.14591).

    Positions:

    * the distance that the last query sees against the true one, band by band, with the trained length;
    * the distance seen between every query and every key.

    Temperature: t(i) against position i.

    Args:
        scaler: any scaler.
        rope: geometry of the model.
        length: tokens to carry, at least 2; the distances and positions go up to it.
        out_stem: path without suffix.

    Raises:
        ConfigError: the scaler cannot work on this geometry, or `length` is below 2.
    """
    if length < 2:
        raise ConfigError(f"length {length} leaves nothing to draw; take at least 2 tokens")
    scaler.check(rope)
    facets = facets_drawn(scaler)
    heights = [height for facet in facets for height in _HEIGHTS[facet]]
    with style.figure(9, sum(heights) + 0.5, _title(scaler, rope, facets)) as fig:
        grid = fig.add_gridspec(len(heights), 2, height_ratios=heights)
        notes = [f"Drawn for {format_length(length)} tokens."] if scaler.depends_on_length else []
        row = 0
        for facet in facets:
            notes += _DRAW[facet](fig, grid, row, scaler, rope, length)
            row += len(_HEIGHTS[facet])
        if notes:
            fig.supxlabel(textwrap.fill(" ".join(notes), _FOOTNOTE), **style.FOOTNOTE)
        return style.save(fig, out_stem)


def in_short(scaler: Scaler, rope: RopeSpec, length: int) -> dict[str, str]:
    """The numbers behind the panels of `plot_scaler`, in words, by label.

    Raises:
        ConfigError: the scaler does not fit the geometry.
    """
    scaler.check(rope)
    reach, facets = scaler.reach(rope), facets_drawn(scaler)
    carried = "any length" if math.isinf(reach) else f"{int(reach)} tokens"
    lines = {"scaler": str(scaler), "reach": f"{carried} (trained {rope.trained_length})"}
    if "frequencies" in facets:
        inv_freq, factor = scaler.frequencies(rope, length)
        stretch, slowest = rope.theta / inv_freq, float(inv_freq[-1])
        lines["wavelengths slowed"] = f"fastest pair by {stretch[0]:.4g}, slowest by {stretch[-1]:.4g}"
        lines["longest wavelength"] = f"{2 * math.pi / slowest if slowest else math.inf:.4g} tokens"
        lines["factor on cos, sin"] = f"{factor:.6g} (logits by {factor**2:.6g})"
    if "positions" in facets:
        rows = distances_seen(scaler.bands(rope, length), length - 1)
        farthest = max(row.seen.max() for row in rows)
        lines["bands of keys"] = ", ".join(f"{row.band} from distance {row.true[0]}" for row in rows)
        lines["largest distance"] = f"{farthest:.6g} seen, {length - 1} in truth"
    if "temperature" in facets:
        first, last = scaler.logit_factor(torch.tensor([0, length - 1]), rope).tolist()
        lines["factor on logits"] = f"{first:.6g} for the first token, {last:.6g} for the last of {length}"
    return lines


def decay(frequencies: Array, length: int) -> tuple[Array, Array, Array, Array]:
    """f(m) = sum_i cos(m w_i) over the distances 1 <= m < length, in steps that are even in log m.

    Args:
        frequencies: w_i in radians per position, [d/2].
        length: in tokens, at least 2.

    Returns:
        Of every step: the middle distance, and mean, least and greatest f(m). A step of more than
            2048
        distances is read at 2048 of them.
    """
    edges = np.unique(np.geomspace(1, length, _BINS).round().astype(np.int64))
    steps = []
    for start, end in itertools.pairwise(edges):
        m = np.unique(np.linspace(start, end - 1, min(end - start, _PER_BIN)).round())
        f = np.cos(np.outer(m, frequencies)).sum(axis=1)
        steps.append((np.sqrt(m[0] * m[-1]), f.mean(), f.min(), f.max()))
    middle, mean, least, greatest = np.array(steps).T
    return middle, mean, least, greatest


def _title(scaler: Scaler, rope: RopeSpec, facets: list[str]) -> str:
    geometry = f"d = {rope.dim}, base {rope.base:g}, " if "frequencies" in facets else ""
    model = f": {geometry}trained length {format_length(rope.trained_length)}"
    return _short(str(scaler), _TITLE - len(model)) + model


def _label(scaler: Scaler, *facets: Facet) -> str:
    """The parts of `scaler` that set `facets`, as a spec short enough for a legend."""
    return _short(str(compose(*(part for part in scaler.parts if part.facet in facets))), _LEGEND)


def _short(text: str, letters: int) -> str:
    return text if len(text) <= letters else text[: letters - 1] + "…"


def _frequencies(fig: Figure, grid: GridSpec, row: int, scaler: Scaler, rope: RopeSpec, length: int) -> list[str]:
    scaled, factor = scaler.frequencies(rope, length)
    name = _label(scaler, "frequencies", "wavelength grid")
    looks = style.line_styles([UNTOUCHED, name])
    curves = {UNTOUCHED: rope.theta.numpy(), name: scaled.numpy()}
    lengths = {"trained length": rope.trained_length, "target length": length}
    _wavelengths(fig.add_subplot(grid[row, 0]), curves, looks, lengths)
    _stretch(fig.add_subplot(grid[row, 1]), curves, looks)
    _decay(fig.add_subplot(grid[row + 1, :]), curves, looks, lengths)
    notes = []
    if np.array_equal(curves[UNTOUCHED], curves[name]):
        notes.append("This scaler leaves the frequencies as they are.")
    if factor != 1:
        notes.append(f"cos and sin are multiplied by {factor:.4g}, attention logits by {factor**2:.4g}.")
    return [*notes, "Shaded: range of the sum within each step of m."]


def _positions(fig: Figure, grid: GridSpec, row: int, scaler: Scaler, rope: RopeSpec, length: int) -> list[str]:
    bands = scaler.bands(rope, length)
    carried = scaler.rope_for_positions(rope).trained_length
    limits = {"trained length": rope.trained_length}
    if carried > rope.trained_length:
        limits[f"carried by {_label(scaler, 'frequencies')}:"] = carried
    draw_distances(fig.add_subplot(grid[row, 0]), bands, length, limits)
    return draw_map(fig.add_subplot(grid[row, 1]), bands, length, carried)


def _temperature(fig: Figure, grid: GridSpec, row: int, scaler: Scaler, rope: RopeSpec, length: int) -> list[str]:
    axes = fig.add_subplot(grid[row, :])
    style.style_axes(axes, x="position i of the query (tokens)", y="factor t(i) on the logits")
    low = max(1, min(length, rope.trained_length) // 16)
    at = torch.from_numpy(np.unique(np.geomspace(low, length, _BINS).round().astype(np.int64)))
    name = _label(scaler, "temperature")
    look = style.line_styles([UNTOUCHED, name])
    factor = scaler.logit_factor(at - 1, rope).numpy()  # the i-th token is at position i - 1
    axes.plot(at, np.ones(len(at)), color=look[UNTOUCHED].color, ls=look[UNTOUCHED].dashes, lw=1.4, label=UNTOUCHED)
    axes.plot(at, factor, color=look[name].color, lw=look[name].width, label=name)
    length_ticks(axes, low, length)
    axes.margins(y=0.15)
    style.mark_length(axes, rope.trained_length, f"trained length {format_length(rope.trained_length)}")
    legend_above(axes)
    return []


_DRAW = {"frequencies": _frequencies, "positions": _positions, "temperature": _temperature}


def _wavelengths(axes: Axes, curves: Curves, looks: Looks, lengths: dict[str, int]) -> None:
    style.style_axes(axes, x="pair i", y="wavelength (tokens)")
    for name, frequencies in curves.items():
        rotating = np.flatnonzero(frequencies > 0)  # a pair that does not rotate has no wavelength
        look = looks[name]
        waves = 2 * np.pi / frequencies[rotating]
        axes.plot(rotating, waves, color=look.color, ls=look.dashes, lw=look.width, label=name)
    axes.set_yscale("log")
    mark_levels(axes, lengths)
    axes.legend(frameon=False, loc="lower right")


def _stretch(axes: Axes, curves: Curves, looks: Looks) -> None:
    style.style_axes(axes, x="pair i", y="stretch (plain / scaled frequency)")
    plain = curves[UNTOUCHED]
    for name, frequencies in curves.items():
        rotating = np.flatnonzero((frequencies > 0) & (plain > 0))
        look = looks[name]
        stretch = plain[rotating] / frequencies[rotating]
        axes.plot(rotating, stretch, color=look.color, ls=look.dashes, lw=look.width)


def _decay(axes: Axes, curves: Curves, looks: Looks, lengths: dict[str, int]) -> None:
    style.style_axes(axes, x="distance m (tokens)", y="sum over pairs of cos(m w)")
    length = lengths["target length"]
    ticks = [2**power for power in range(length.bit_length())]
    style.length_axis(axes, sorted({*ticks, length}), 1, length)
    axes.axhline(0, color=style.INK, lw=0.9, zorder=1)
    for name, frequencies in curves.items():
        middle, mean, least, greatest = decay(frequencies, length)
        look = looks[name]
        axes.fill_between(middle, least, greatest, color=look.color, alpha=0.14, lw=0)
        axes.plot(middle, mean, color=look.color, ls=look.dashes, lw=look.width * 0.8)
    trained = lengths["trained length"]
    style.mark_length(axes, trained, f"trained length {format_length(trained)}")
