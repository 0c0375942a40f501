"""Plots of rotary bases against the base bound, and of what engines make of a rotary config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from ...errors import ConfigError
from ...scaling import RopeSpec, format_length
from ...scaling.base import BaseRule
from ...scaling.base_bound import preference
from ...scaling.engine_reading import EngineReading, same_frequencies
from ..runs.compare import UNTOUCHED
from . import style
from .distance_plot import Array, Whole, length_ticks

_STEPS = 320


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One base: the rules that give it, and what its f_b(m) is in every step of distances.

    Args:
        edges: first distance of every step, and N: int64 [steps + 1].
        least: lowest f_b(m) of every step, [steps].
    """

    name: str
    base: float
    fails_at: int | None
    look: style.LineStyle
    edges: Whole
    least: Array


def plot_bases(rules: Sequence[BaseRule], rope: RopeSpec, length: int, out_stem: Path) -> tuple[Path, Path]:
    """f_b(m) of every rule's base up to `length`, and below it the distances at which it is
    negative.

    Writes `out_stem`.png and .svg and returns their paths. Every distance is computed; distances
    are joined in steps that are even in log m, and the lowest f_b(m) of each step is drawn.

    Args:
        rules: from `base_rules(rope, length)`.
        rope: geometry of the model.
        length: N in tokens, at least 2.
        out_stem: path without suffix.

    Raises:
        ConfigError: `length` is below 2.
    """
    if length < 2:
        raise ConfigError(f"length {length} leaves nothing to draw; take at least 2 tokens")
    drawn = curves(rules, rope.dim, length)
    strips = 0.9 + 0.3 * len(drawn)
    trained = f"trained length {format_length(rope.trained_length)}"
    title = f"Bases for {format_length(length)} tokens: d = {rope.dim}, base {rope.base:g}, {trained}"
    with style.figure(9, 4.4 + strips, title) as fig:
        sums, failures = fig.subplots(2, 1, height_ratios=(3.6, strips), sharex=True)
        _draw_sums(sums, drawn)
        _draw_failures(failures, drawn)
        length_ticks(failures, _first_shown(drawn, rope), length)
        sums.tick_params(labelbottom=True)
        for axes in (sums, failures):
            axes.axvline(rope.trained_length, color=style.MUTED, linewidth=1.1, linestyle=":", zorder=1)
        at = {"xy": (rope.trained_length, 1), "xycoords": sums.get_xaxis_transform()}
        right = "right" if rope.trained_length == length else "center"
        sums.annotate(trained, **at, va="bottom", ha=right, color=style.MUTED, fontsize=9)
        fig.supxlabel(
            "Lowest f(m) of each step of m. Where it is below zero (bars), a similar token at that distance scores "
            "below a random one (arXiv 2405.14591).",
            **style.FOOTNOTE,
        )
        return style.save(fig, out_stem)


def curves(rules: Sequence[BaseRule], dim: int, length: int) -> list[Curve]:
    """A curve for every base that `rules` give, the model's own first; rules that give the same
    share one."""
    edges = np.unique(np.geomspace(1, length, _STEPS).round().astype(np.int64))
    names: dict[float, list[str]] = {}
    for rule in rules:
        names.setdefault(rule.base, []).append(rule.name)
    first = {rule.base: rule for rule in reversed(rules)}
    specs = [UNTOUCHED, *(first[base].spec for base in list(names)[1:])]
    looks = style.series_styles(specs)
    return [
        Curve(
            name=", ".join(names[base]),
            base=base,
            fails_at=first[base].fails_at,
            look=looks[spec],
            edges=edges,
            least=np.minimum.reduceat(preference(base, dim, length).numpy(), edges[:-1]),
        )
        for base, spec in zip(names, specs, strict=True)
    ]


def _first_shown(drawn: Sequence[Curve], rope: RopeSpec) -> int:
    """A power of two a good deal nearer than where anything fails: there is nothing to see
    before."""
    nearest = min([rope.trained_length, *(curve.fails_at for curve in drawn if curve.fails_at is not None)])
    return 1 << max(0, nearest.bit_length() - 6)


def _draw_sums(axes: Axes, drawn: Sequence[Curve]) -> None:
    style.style_axes(axes, x="", y="f(m) = sum over pairs of cos(m w)")
    axes.axhline(0, color=style.INK, lw=0.9, zorder=1)
    for curve in drawn:
        middle = np.sqrt(curve.edges[:-1] * (curve.edges[1:] - 1))
        axes.plot(middle, curve.least, color=curve.look.color, ls=curve.look.dashes, lw=0.7 * curve.look.width)
    axes.set_yscale("symlog", linthresh=3)
    low, high = axes.get_ylim()
    axes.set_yticks([tick for tick in (-100, -30, -10, -3, 0, 3, 10, 30, 100) if low <= tick <= high])
    axes.set_yticks([], minor=True)
    axes.yaxis.set_major_formatter("{x:g}")


def _draw_failures(axes: Axes, drawn: Sequence[Curve]) -> None:
    """A line for every base, with bars where it fails."""
    style.style_axes(axes, x="distance m (tokens)", y="")
    axes.grid(visible=False)
    for row, curve in enumerate(drawn):
        axes.axhline(row, color=style.GRID, lw=1.1, zorder=1)
        turns = np.flatnonzero(np.diff(curve.least < 0, prepend=False, append=False))
        for start, stop in turns.reshape(-1, 2):
            axes.plot(curve.edges[[start, stop]], [row, row], color=curve.look.color, lw=6, solid_capstyle="butt")
        axes.annotate(
            "carries all" if curve.fails_at is None else f"fails at {curve.fails_at}",
            (1, row),
            xycoords=axes.get_yaxis_transform(),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    bases = [f"{curve.base:,.0f}" if curve.base >= 1000 else f"{curve.base:.4g}" for curve in drawn]
    labels = [f"{curve.name}  {base}" for curve, base in zip(drawn, bases, strict=True)]
    axes.set_yticks(range(len(drawn)), labels, fontsize=9)
    for tick, curve in zip(axes.get_yticklabels(), drawn, strict=True):
        tick.set_color(curve.look.color)
    axes.set_ylim(len(drawn) - 0.4, -0.6)


_DASHES = ("-", "--", "-.", ":")


def plot_readings(readings: Sequence[EngineReading], length: int, name: str, out_stem: Path) -> tuple[Path, Path]:
    """The plain period over that of each engine, by rotary pair; engines that agree share a curve.

    Writes `out_stem`.png and .svg and returns their paths.

    Args:
        readings: the others are compared with the first one.
        length: tokens of the text.
        name: of the model.
        out_stem: path without suffix.

    Raises:
        ConfigError: no engine takes the config.
    """
    groups = _equal_readings(readings, length)
    if not groups:
        raise ConfigError("no engine takes this config, so there is nothing to draw")
    title = f"{name}: what engines make of its rotary config, at {format_length(length)} tokens"
    plain, colours = readings[0].rope.theta.numpy(), style.categories(len(groups) + 1)[1:]
    with style.figure(9, 4.6, title) as fig:
        axes = fig.subplots()
        style.style_axes(axes, x="rotary pair, fastest first", y="times slower than plain")
        for place, group in enumerate(groups):
            frequencies = group[0].frequencies(length)
            assert frequencies is not None
            label = f"{', '.join(reading.engine for reading in group)}: m = {frequencies.attention_factor:.4g}"
            with np.errstate(divide="ignore", invalid="ignore"):
                slower = plain / frequencies.inv_freq.numpy()
            axes.plot(
                np.where(np.isfinite(slower) & (slower < 1e20), slower, np.nan),
                _DASHES[place % len(_DASHES)],
                color=colours[place],
                lw=2.2 - 0.25 * min(place, 4),
                label=label,
            )
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.legend(frameon=False, fontsize=9)
        fig.supxlabel("m multiplies cos and sin, so attention logits get its square.", **style.FOOTNOTE)
        return style.save(fig, out_stem)


def _equal_readings(readings: Sequence[EngineReading], length: int) -> list[list[EngineReading]]:
    """Readings that compute the same, together; those that refuse are left out."""
    groups: list[list[EngineReading]] = []
    for reading in readings:
        if reading.scaler is None:
            continue
        same = next((group for group in groups if same_frequencies(group[0], reading, length)), None)
        if same is None:
            groups.append([reading])
        else:
            same.append(reading)
    return groups
