"""What a scaler does to the rotary frequencies, drawn: wavelengths, stretch and long-range decay."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from ..scaling import RopeSpec, Scaler, format_length
from . import style
from .compare import UNTOUCHED

Array = np.ndarray[tuple[int], np.dtype[np.float64]]

Curves = dict[str, Array]
Looks = dict[str, style.LineStyle]

_BINS = 320
_PER_BIN = 2048


def plot_scaler(scaler: Scaler, rope: RopeSpec, length: int, out_stem: Path) -> tuple[Path, Path]:
    """Three panels, plain against scaled; writes `out_stem`.png and .svg and returns their paths.

    * wavelength 2 pi / w_i of every pair, with the trained length and `length`;
    * stretch lambda_i = theta_i / w_i of every pair;
    * long-range decay f(m) = sum_i cos(m w_i) against distance m, mean and range over each step of m.
      Where it is below zero, a similar token that far away is scored below a random one (arXiv 2405.14591).

    Args:
        scaler: any scaler; position maps and temperatures leave the frequencies as they are.
        rope: geometry of the model.
        length: tokens to carry; the distances go up to it.
        out_stem: path without suffix.

    Raises:
        ConfigError: the scaler cannot work on this geometry.
    """
    scaler.check(rope)
    scaled, factor = scaler.frequencies(rope, length)
    plain, frequencies = rope.theta.numpy(), scaled.numpy()
    name = str(scaler)
    title = f"{name}: d = {rope.dim}, base {rope.base:g}, trained length {format_length(rope.trained_length)}"
    with style.figure(9, 7, title) as fig:
        grid = fig.add_gridspec(2, 2, height_ratios=(1, 1.05))
        looks = style.line_styles([UNTOUCHED, name])
        curves = {UNTOUCHED: plain, name: frequencies}
        lengths = {"trained length": rope.trained_length, "target length": length}
        _wavelengths(fig.add_subplot(grid[0, 0]), curves, looks, lengths)
        _stretch(fig.add_subplot(grid[0, 1]), curves, looks)
        _decay(fig.add_subplot(grid[1, :]), curves, looks, lengths)
        fig.supxlabel(_notes(scaler, curves, factor, length), **style.FOOTNOTE)
        return style.save(fig, out_stem)


def decay(frequencies: Array, length: int) -> tuple[Array, Array, Array, Array]:
    """f(m) = sum_i cos(m w_i) over the distances 1 <= m < length, in steps that are even in log m.

    Args:
        frequencies: w_i in radians per position, [d/2].
        length: in tokens, at least 2.

    Returns:
        Of every step: the middle distance, and mean, least and greatest f(m). A step of more than 2048
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


def _wavelengths(axes: Axes, curves: Curves, looks: Looks, lengths: dict[str, int]) -> None:
    style.style_axes(axes, x="pair i", y="wavelength (tokens)")
    for name, frequencies in curves.items():
        turning = np.flatnonzero(frequencies > 0)  # a pair that stands still has no wavelength
        look = looks[name]
        waves = 2 * np.pi / frequencies[turning]
        axes.plot(turning, waves, color=look.color, ls=look.dashes, lw=look.width, label=name)
    axes.set_yscale("log")
    for tokens, label in {tokens: label for label, tokens in reversed(lengths.items())}.items():
        axes.axhline(tokens, color=style.MUTED, ls=":", lw=1.1, zorder=1)
        at_top = tokens == max(lengths.values())
        axes.annotate(
            f"{label} {format_length(tokens)}",
            (0, tokens),
            xycoords=axes.get_yaxis_transform(),
            xytext=(4, 3 if at_top else -3),
            textcoords="offset points",
            va="bottom" if at_top else "top",
            fontsize=9,
            color=style.MUTED,
        )
    axes.legend(frameon=False, loc="lower right")


def _stretch(axes: Axes, curves: Curves, looks: Looks) -> None:
    style.style_axes(axes, x="pair i", y="stretch (plain / scaled frequency)")
    plain = curves[UNTOUCHED]
    for name, frequencies in curves.items():
        turning = np.flatnonzero((frequencies > 0) & (plain > 0))
        look = looks[name]
        stretch = plain[turning] / frequencies[turning]
        axes.plot(turning, stretch, color=look.color, ls=look.dashes, lw=look.width)


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
    if 1 < trained < length:
        style.mark_length(axes, trained, f"trained length {format_length(trained)}")


def _notes(scaler: Scaler, curves: Curves, factor: float, length: int) -> str:
    notes = [f"Frequencies for {format_length(length)} tokens." if scaler.depends_on_length else ""]
    if all(np.array_equal(curves[UNTOUCHED], frequencies) for frequencies in curves.values()):
        notes.append("This scaler leaves the frequencies as they are.")
    if factor != 1:
        notes.append(f"cos and sin are multiplied by {factor:.4g}, attention logits by {factor**2:.4g}.")
    notes.append("Shaded: range of the sum within each step of m.")
    return " ".join(filter(None, notes))
