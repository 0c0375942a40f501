"""What a position map does to distances, drawn: distance seen against true distance, and the map of
every pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.ticker import FuncFormatter, NullLocator
from torch import Tensor

from ...scaling import format_length
from ...scaling.band import Band, PositionMap, pair_positions
from . import style

Array = np.ndarray[tuple[int], np.dtype[np.float64]]
Whole = np.ndarray[tuple[int], np.dtype[np.int64]]
Matrix = np.ndarray[tuple[int, int], np.dtype[np.float64]]

BEYOND = "#c1121f"
"""Colour of the distances that were never trained."""

_POINTS = 2048
_CELLS = 400


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What one query sees through one band: true distances, ascending, and the distances seen in
    their place."""

    band: str
    true: Whole
    seen: Array


def distances_seen(bands: Sequence[Band], query: int) -> list[Seen]:
    """The distances that `query` (0-based) sees, band by band from the nearest; bands without keys
    are left out. Where rotary pairs have positions of their own, they are those of the slowest.

    A band of more than 2048 keys is read at about that many, even in the logarithm of the distance,
    its ends included.
    """
    i = torch.tensor(query)
    rows = []
    for band in bands:
        start, stop = int(band.start(i)), int(band.stop(i))
        if start < stop:
            true = _spaced(query - stop + 1, query - start)
            key = _slowest(band.key, torch.from_numpy(query - true)).numpy()
            rows.append(Seen(band=band.name, true=true, seen=float(_slowest(band.query, i)) - key))
    return sorted(rows, key=lambda row: int(row.true[0]))


def _slowest(position_map: PositionMap, tokens: Tensor) -> Tensor:
    """The positions of `tokens` for the slowest rotary pair."""
    return pair_positions(position_map, tokens)[..., -1]


def distance_map(bands: Sequence[Band], length: int, cells: int = _CELLS) -> Matrix:
    """Distance that query i (row) sees key j (column) at, for at most `cells` positions, evenly
    from 0, of a text of `length` tokens. NaN where the query sees no such key: it lies ahead, or is
    forgotten.

    The pairs are read, not averaged: bands and chunks narrower than a cell come out one cell wide
    or not at all.
    """
    size = min(cells, length)
    positions = torch.arange(size) * length // size
    i, j = positions[:, None], positions[None, :]
    distances = np.full((size, size), np.nan)
    for band in bands:
        inside = ((j >= band.start(i)) & (j < band.stop(i))).numpy()
        distances[inside] = (_slowest(band.query, i) - _slowest(band.key, j)).numpy()[inside]
    return distances


def draw_distances(axes: Axes, bands: Sequence[Band], length: int, limits: Mapping[str, int]) -> None:
    """Distance seen against true distance for the last query of `length` tokens, a line for each
    band.

    Args:
        axes: an empty panel.
        bands: the bands of a position map.
        length: in tokens, at least 2.
        limits: distances to mark, with their names, from the shortest.
    """
    style.style_axes(axes, x="true distance of the last query (tokens)", y="distance seen (tokens)")
    rows = distances_seen(bands, length - 1)
    # Nearer than an eighth of where the nearest band ends there is nothing to see, and 0 has no logarithm.
    low = 2 ** max(0, int(rows[0].true[-1]).bit_length() - 4)
    rows = [replace(row, true=row.true[row.true >= low], seen=row.seen[row.true >= low]) for row in rows]
    looks = style.series_styles([row.band for row in rows])
    axes.plot([low, length], [low, length], color=style.MUTED, ls=(0, (4, 2)), lw=1.1, label="plain", zorder=1)
    for row in rows:
        true, seen = broken(row)
        short = row.true.size and row.true[-1] < 1.02 * row.true[0]
        look = {"ls": "", "marker": "o", "ms": 5, "clip_on": False} if short else {"lw": 1.9}
        axes.plot(true, seen, color=looks[row.band].color, label=row.band, **look)
    distances = np.concatenate([row.seen for row in rows])
    top = 1.6 * max(distances.max(), *limits.values())
    length_ticks(axes, low, length)
    if distances.min() >= 1:
        axes.set_yscale("log", base=2)
        axes.set_ylim(min(low, distances.min()) / 1.1, top)
    else:
        axes.set_yscale("symlog", base=2, linthresh=1)
        axes.set_ylim(-0.1, top)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda tokens, _: format_length(int(tokens))))
    axes.yaxis.set_minor_locator(NullLocator())
    mark_levels(axes, limits)
    legend_above(axes)


def draw_map(axes: Axes, bands: Sequence[Band], length: int, limit: int) -> list[str]:
    """Every query against every key of `length` tokens, coloured by the distance seen, with the
    bands' borders.

    Args:
        axes: an empty panel, made square.
        bands: the bands of a position map.
        length: in tokens, at least 2.
        limit: distances from here on were never trained; they get a colour of their own.

    Returns:
        Sentences that explain the colours which the bar does not.
    """
    distances = distance_map(bands, length)
    farthest = float(np.nanmax(distances))
    beyond = farthest >= limit
    shades = matplotlib.colormaps["YlGnBu"](np.linspace(0.12, 1, 256))
    colours = ListedColormap(shades).with_extremes(over=BEYOND, bad=(0, 0, 0, 0))
    image = axes.imshow(
        distances,
        cmap=colours,
        vmin=0,
        vmax=min(farthest, limit - 1),
        extent=(0, length, length, 0),
        interpolation="nearest",
    )
    for key, query in _borders(bands, length):
        axes.plot(key, query, color=style.INK, lw=1.4)
        axes.plot(key, query, color=style.PAPER, lw=0.7)
    style.style_axes(axes, x="key j", y="query i")
    axes.grid(visible=False)
    axes.set_anchor("N")
    axes.spines[["left", "bottom"]].set_position(("outward", 3))  # off the first keys, which may be a narrow band
    ticks = _round_lengths(length)
    axes.set_xticks(ticks, [format_length(tick) for tick in ticks])
    axes.set_yticks(ticks, [format_length(tick) for tick in ticks])
    bar = axes.figure.colorbar(image, cax=axes.inset_axes((1.05, 0, 0.045, 1)), extend="max" if beyond else "neither")
    bar.outline.set_visible(False)
    ticks = _round_lengths(min(farthest, limit - 1))
    bar.set_ticks(ticks, labels=[format_length(tick) for tick in ticks])
    bar.set_label("distance seen (tokens)")
    notes = [f"Red: distances of {format_length(limit)} and more, never trained."] if beyond else []
    forgotten = np.isnan(distances[np.tril_indices(len(distances))]).any()
    return [*notes, "Blank below the diagonal: keys forgotten."] if forgotten else notes


def length_ticks(axes: Axes, low: int, length: int) -> None:
    """A log2 axis from `low` to `length` for a panel of half the width: the powers of two that
    there is room for."""
    room = (length / low) ** 0.12
    powers = [2**power for power in range(length.bit_length()) if low <= 2**power < length / room]
    style.length_axis(axes, [length, *powers[:: -1 if len(powers) <= 7 else -2]], low, length)


def legend_above(axes: Axes) -> None:
    """Names of the lines in a row above the panel, where no line can cross them."""
    axes.legend(
        frameon=False,
        loc="lower left",
        bbox_to_anchor=(-0.02, 1),
        ncols=4,
        fontsize=9,
        handlelength=1.3,
        handletextpad=0.5,
        columnspacing=1.0,
    )


def mark_levels(axes: Axes, levels: Mapping[str, int]) -> None:
    """A dotted line and its name at every level, the highest named above its line and the others
    below."""
    for tokens, label in {tokens: label for label, tokens in reversed(list(levels.items()))}.items():
        axes.axhline(tokens, color=style.MUTED, ls=":", lw=1.1, zorder=1)
        at_top = tokens == max(levels.values())
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


def broken(row: Seen) -> tuple[Array, Array]:
    """The line of a band, broken (by NaN) where its distances run back: there a chunk of keys
    ends."""
    at = 1 + np.flatnonzero(np.diff(row.seen) < 0)
    return np.insert(row.true.astype(np.float64), at, np.nan), np.insert(row.seen, at, np.nan)


def _spaced(first: int, last: int) -> Whole:
    if last - first < _POINTS:
        return np.arange(first, last + 1)
    spaced = np.geomspace(first + 1, last + 1, _POINTS).round().astype(np.int64) - 1
    return np.unique(spaced.clip(first, last))


def _borders(bands: Sequence[Band], length: int) -> list[tuple[Array, Whole]]:
    """Lines (key, query) where one band of a query ends and another starts."""
    queries = torch.arange(min(4 * _CELLS, length)) * length // min(4 * _CELLS, length)
    spans = [(band.start(queries), band.stop(queries)) for band in bands]
    ends = torch.stack([torch.where(start < stop, stop, -1) for start, stop in spans])
    return [
        (np.where((start < stop) & (ends == start).any(0), start, np.nan), queries.numpy()) for start, stop in spans
    ]


def _round_lengths(last: float) -> list[int]:
    """0 and the multiples of a power of two up to `last`, five or six at most."""
    step = 1
    while step * 5 < last:
        step *= 2
    return list(range(0, int(last) + 1, step))
