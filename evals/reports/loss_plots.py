"""Plots of perplexity rows: loss against context, loss by position, and harm."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes

from ...errors import DataError
from ...scaling import format_length
from ..protocols.by_name import PROTOCOLS
from ..protocols.fixed_target import FixedTarget
from ..protocols.harm import Harm
from ..protocols.whole_text import ByPosition
from ..runs import compare
from ..runs.result import Row, Run
from . import style

OFF_SCALE = 1.0
"""Nats above the best loss at the trained length beyond which a value is marked at the edge
instead."""

_HEIGHT, _LINE = 4.1, 0.215  # inches of a plot, and of each line of its legend
_MARK_WIDTH, _MARK_HEIGHT = 0.16, 0.065  # of a mark of what is off the scale with its text, as shares of the axes


@dataclass(frozen=True, kw_only=True)
class Point:
    """A loss at a length, with its interval (NaN where there is none)."""

    x: float
    loss: float
    low: float = math.nan
    high: float = math.nan


Curves = dict[str, list[Point]]


def _off_scale(curves: Curves, top: float) -> list[tuple[str, Point]]:
    """The points above the axis, but those at the end of a curve, whose loss is in the legend."""
    return [(rope, point) for rope, points in curves.items() for point in points[:-1] if point.loss > top]


def _height(curves: Curves, trained_length: int) -> float:
    """Inches of a plot: the legend has a line for each curve, and what is off the scale is written above."""
    _, top = scale(curves, trained_length)
    off_scale = Counter(point.x for _, point in _off_scale(curves, top))
    return _HEIGHT + _LINE * (len(curves) + max(off_scale.values(), default=0))


def plot_run(run: Run) -> list[Path]:
    """Every plot of a run into its folder, one for each group; returns the PNG and SVG files.

    `loss`, `loss_by_position` and `harm`; further groups of the same kind are `loss_2` and so on.
    """
    paths: list[Path] = []
    for stem, group in named_groups(run.rows):
        draw = {Harm.name: plot_harm, ByPosition.name: plot_by_position}.get(group[0]["protocol"])
        out = run.folder / stem
        paths += draw(group, out) if draw else plot_loss_curve(group, run, out)
    return paths


def named_groups(rows: Iterable[Row]) -> list[tuple[str, list[Row]]]:
    """The groups that have a loss, each with the name of its plot's files."""
    named: list[tuple[str, list[Row]]] = []
    taken: Counter[str] = Counter()
    for group in compare.comparable_groups(row for row in rows if row.get("loss") is not None):
        stem = {ByPosition.name: "loss_by_position", Harm.name: "harm"}.get(group[0]["protocol"], "loss")
        taken[stem] += 1
        named.append((f"{stem}_{taken[stem]}" if taken[stem] > 1 else stem, group))
    return named


def plot_loss_curve(rows: Sequence[Row], run: Run, out_stem: Path) -> tuple[Path, Path]:
    """Loss against context, a line for each method; writes `out_stem`.png and .svg and returns
    their paths.

    Shaded are 95% intervals: of the paired difference to the untouched model at its trained length
    where the run holds the losses for it, since the difficulty of the text is common to all; else
    of each loss.

    Args:
        rows: one group, any protocol but by-position.
        run: where the per-token losses are.
        out_stem: path without suffix.

    Raises:
        DataError: nothing to draw, or rows measured in different ways.
    """
    group = _only_group(rows)
    base, delta = compare.reference(group), compare.deltas(run, group)
    curves: Curves = {}
    for rope in compare.methods(group):
        points = []
        for at in compare.columns(group):
            row = compare.row_with_loss(group, rope, at)
            if row is None:
                continue
            if base is None:
                low, high = _interval(row)
            elif row["key"] in delta:
                low, high = (base["loss"] + bound for bound in (delta[row["key"]].low, delta[row["key"]].high))
            else:
                low, high = math.nan, math.nan
            points.append(Point(x=row["context"], loss=row["loss"], low=low, high=high))
        curves[rope] = points
    of = f"the difference to the untouched model at {format_length(base['context'])}" if base else "the loss"
    contexts = sorted({row["context"] for row in group})
    if len(contexts) == 1:
        return _plot_one_context(group, run, out_stem)
    with style.figure(style.WIDTH, _height(curves, group[0]["trained_length"]), _title(group)) as fig:
        axes = fig.add_subplot()
        style.style_axes(axes, x="context (tokens)", y="loss (nats per token)")
        style.length_axis(axes, contexts, min(contexts) / 1.1, max(contexts) * 1.06)
        _draw(axes, curves, group[0]["trained_length"], has_gap=True)
        style.footnote(fig, f"{_scored(group)} Shaded: 95% interval of {of}.")
        return style.save(fig, out_stem)


def _plot_one_context(group: Sequence[Row], run: Run, out_stem: Path) -> tuple[Path, Path]:
    """A bar for each method: the difference to the untouched model at this context, or the loss where there is no
    difference."""
    (at,) = compare.columns(group)
    rows = {rope: compare.row_with_loss(group, rope, at) for rope in compare.methods(group)}
    measured = {rope: row for rope, row in rows.items() if row is not None}
    plain = measured.get(compare.UNTOUCHED)
    changes = {
        rope: change
        for rope, row in measured.items()
        if row is not plain and (change := compare.difference(run, row, plain)) is not None
    }
    bars: dict[str, style.Bar] = {}
    if plain is not None and len(changes) == len(measured) - 1 > 0:
        x = "loss less that of the untouched model (nats per token)"
        for rope, change in changes.items():
            text = f"{change.mean:+.3f}".replace("-", "\u2212")
            bars[rope] = style.Bar(value=change.mean, low=change.low, high=change.high, text=text)
        note = f"The untouched model has {plain['loss']:.3f}. Lines: 95% intervals of the paired difference."
    else:
        x = "loss (nats per token)"
        for rope, row in measured.items():
            low, high = _interval(row)
            bars[rope] = style.Bar(value=row["loss"], low=low, high=high, text=f"{row['loss']:.3f}")
        note = "Lines: 95% intervals of the loss."
    title = f"Loss at {compare.columns(group)[at]}: {compare.short(group[0]['model'])} on " + compare.short(
        group[0]["text"]
    )
    with style.figure(style.WIDTH, 1.5 + 0.5 * len(bars), title) as fig:
        style.draw_bars(fig.add_subplot(), bars, style.line_styles([*measured]), x)
        style.footnote(fig, f"{_scored(group)} {note}")
        return style.save(fig, out_stem)


def plot_by_position(rows: Sequence[Row], out_stem: Path) -> tuple[Path, Path]:
    """Loss in buckets of position (powers of two), a line for each method; files as
    `plot_loss_curve`.

    Args:
        rows: one by-position group, which has one context.
        out_stem: path without suffix.

    Raises:
        DataError: nothing to draw, or rows measured in different ways.
    """
    group = _only_group(rows)
    if group[0]["protocol"] != "by-position":
        raise DataError(f"rows of protocol {group[0]['protocol']!r} have no position buckets; plot their loss curve")
    curves: Curves = {}
    for rope in compare.methods(group):
        measured = [compare.row_with_loss(group, rope, at) for at in compare.columns(group)]
        curves[rope] = [
            Point(x=_centre(row), loss=row["loss"], low=_interval(row)[0], high=_interval(row)[1])
            for row in measured
            if row is not None
        ]
    edges = {edge for row in group for edge in (_left(row), row["bucket_end"])}
    with style.figure(style.WIDTH, _height(curves, group[0]["trained_length"]), _title(group)) as fig:
        axes = fig.add_subplot()
        style.style_axes(axes, x="position in the text (tokens)", y="loss (nats per token)")
        style.length_axis(axes, sorted(edges), min(edges), max(edges) * 1.02)
        _draw(axes, curves, group[0]["trained_length"])
        style.footnote(fig, f"{_scored(group)} Shaded: 95% interval of the loss.")
        return style.save(fig, out_stem)


def _draw(axes: Axes, curves: Curves, trained_length: int, *, has_gap: bool = False) -> None:
    """Curves, the trained length, marks for what is off the scale, and a label at the end of each curve.

    With `has_gap` no line crosses the trained length: without a point there it is unknown where a curve begins to rise.
    """
    bottom, top = scale(curves, trained_length)
    axes.set_ylim(bottom, top)
    style.mark_length(axes, trained_length, f"trained length {format_length(trained_length)}")
    looks = style.line_styles(list(curves))
    for rope, points in curves.items():
        look = looks[rope]
        parts = [points]
        if has_gap and trained_length not in {p.x for p in points}:
            parts = [[p for p in points if p.x < trained_length], [p for p in points if p.x > trained_length]]
        for part in parts:
            xs = [p.x for p in part]
            axes.fill_between(xs, [p.low for p in part], [p.high for p in part], color=look.color, alpha=0.13, lw=0)
            if len(part) == 1:  # a band without width cannot be seen
                axes.vlines(xs, part[0].low, part[0].high, color=look.color, alpha=0.4, lw=look.width)
            axes.plot(xs, [p.loss for p in part], color=look.color, ls=look.dashes, lw=look.width, zorder=3)
        on_scale = [p for p in points if p.loss <= top]
        axes.plot([p.x for p in on_scale], [p.loss for p in on_scale], look.marker, ms=5, color=look.color, zorder=4)
    _mark_off_scale(axes, [(point, looks[rope]) for rope, point in _off_scale(curves, top)])
    style.legend_below(axes, _end_labels(curves), looks)


def _end_labels(curves: Curves) -> dict[str, str]:
    """`yarn:2  3.50` for each curve, the highest end first; with its context where others go further."""
    ends = {rope: points[-1] for rope, points in curves.items() if points}
    furthest = max(end.x for end in ends.values())
    return {
        rope: f"{rope}  {end.loss:.2f}" + (f" at {format_length(int(end.x))}" if end.x < furthest else "")
        for rope, end in sorted(ends.items(), key=lambda pair: -pair[1].loss)
    }


def scale(curves: Curves, trained_length: int) -> tuple[float, float]:
    """Bottom and top of the loss axis: every value up to `OFF_SCALE` above the best at the trained
    length (of all, where that was not measured), so that a broken baseline does not flatten the
    rest; and the untouched model up to its trained length, whose short contexts may lie higher than
    that."""
    points = [point for curve in curves.values() for point in curve]
    at_length = [p.loss for p in points if p.x == trained_length] or [p.loss for p in points]
    on_scale = [p for p in points if p.loss <= min(at_length) + OFF_SCALE]
    on_scale += [p for p in curves.get(compare.UNTOUCHED, []) if p.x <= trained_length]
    bounds = [b for p in on_scale for b in (p.loss, p.low, p.high) if math.isfinite(b)]
    low, high = min(bounds), max(bounds)
    margin = max(0.06 * (high - low), 0.02)
    return low - margin, high + margin


def _mark_off_scale(axes: Axes, off_scale: Sequence[tuple[Point, style.LineStyle]]) -> None:
    """An arrowhead and the value over the plot for each point, in as many rows as keep the texts apart."""
    left, right = axes.get_xlim()
    rows: list[list[tuple[float, float]]] = []  # of each row, where its texts begin and end, as shares of the axes
    for point, look in sorted(off_scale, key=lambda pair: (pair[0].loss, pair[0].x)):
        at = math.log(point.x / left) / math.log(right / left)
        is_right = at > 1 - _MARK_WIDTH
        start, end = (at - _MARK_WIDTH, at + 0.02) if is_right else (at - 0.02, at + _MARK_WIDTH)
        row = next((n for n, taken in enumerate(rows) if all(end < a or start > b for a, b in taken)), len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append((start, end))
        place, transform = (point.x, 1.03 + _MARK_HEIGHT * row), axes.get_xaxis_transform()
        axes.plot(*place, marker="^", ms=6, color=look.color, transform=transform, clip_on=False)
        axes.annotate(
            f"{point.loss:.2f}",
            place,
            xycoords=transform,
            xytext=(-7 if is_right else 7, 0),
            textcoords="offset points",
            ha="right" if is_right else "left",
            va="center",
            fontsize=9.5,
            annotation_clip=False,
        )


def _only_group(rows: Sequence[Row]) -> list[Row]:
    groups = compare.comparable_groups(row for row in rows if row.get("loss") is not None)
    if len(groups) != 1:
        raise DataError(f"a plot needs measured perplexity rows of one group; these hold {len(groups)}")
    return groups[0]


def _title(group: Sequence[Row]) -> str:
    what = "by position" if group[0]["protocol"] == ByPosition.name else "against context"
    return f"Loss {what}: {compare.short(group[0]['model'])} on {compare.short(group[0]['text'])}"


def _scored(group: Sequence[Row]) -> str:
    row = group[0]
    if row["protocol"] == FixedTarget.name:
        return f"The same last {row['target']} tokens are scored at every context."
    if row["protocol"] == ByPosition.name:
        return f"One pass over {format_length(row['context'])} tokens, in buckets between the marks."
    known = PROTOCOLS.get(row["protocol"])
    return f"Protocol {row['protocol']}" + (f": {known.scored(row)}." if known else ".")


def _interval(row: Row) -> tuple[float, float]:
    bounds = (row.get("loss_low"), row.get("loss_high"))
    return (math.nan, math.nan) if None in bounds else (row["loss_low"], row["loss_high"])


def _left(row: Row) -> int:
    """The left edge of a bucket; the first one, which starts at 0 or 1, is drawn one octave
    wide."""
    start, end = compare.column(row)
    return max(start, end // 2)


def _centre(row: Row) -> float:
    return math.sqrt(_left(row) * row["bucket_end"])


_PANELS = {"kl": "KL(untouched || scaled), nats", "difference": "loss difference, nats"}
_MOST_LABELS = 8  # bars of a panel that have room for their values
_WIDTH = 0.8  # of a group of bars, of the distance between groups


def plot_harm(rows: Sequence[Row], out_stem: Path) -> tuple[Path, Path]:
    """KL and loss difference at every context, a bar for each scaler; writes `out_stem`.png and
    .svg, returns both.

    Args:
        rows: one group of `harm`.
        out_stem: path without suffix.

    Raises:
        DataError: nothing to draw, or rows measured in different ways.
    """
    groups = compare.comparable_groups(row for row in rows if row.get("loss") is not None)
    if len(groups) != 1 or groups[0][0]["protocol"] != Harm.name:
        raise DataError(f"a plot of harm needs measured rows of one group of it; these hold {len(groups)} groups")
    (group,) = groups
    row = group[0]
    many = len(compare.methods(group))
    with style.figure(
        style.WIDTH,
        6.0 + _LINE * many,
        f"What scaling costs within the trained length: {compare.short(row['model'])} on {compare.short(row['text'])}",
    ) as fig:
        panels = fig.subplots(len(_PANELS), 1, sharex=True)
        for axes, field in zip(panels, _PANELS, strict=True):
            _draw_harm(axes, group, field)
        panels[-1].set_xlabel("context (tokens)")
        panels[0].legend(loc="lower left", bbox_to_anchor=(0, 1), frameon=False, borderpad=0)
        style.footnote(fig, f"Scored: {Harm.scored(row)}. Lines: 95% intervals; same: likeliest next token.")
        return style.save(fig, out_stem)


def _draw_harm(axes: Axes, group: Sequence[Row], field: str) -> None:
    ropes, columns = compare.methods(group), compare.columns(group)
    style.style_axes(axes, x="", y=_PANELS[field])
    axes.axhline(0, color=style.MUTED, linewidth=0.8)
    axes.set_xticks(range(len(columns)), list(columns.values()))
    axes.tick_params(axis="x", length=0)
    looks = style.line_styles(ropes)
    for index, rope in enumerate(ropes):
        step = (index - (len(ropes) - 1) / 2) * _WIDTH / len(ropes)
        measured = [(n + step, compare.row_with_loss(group, rope, at)) for n, at in enumerate(columns)]
        bars = [(place, row) for place, row in measured if row is not None]
        places, values = [place for place, _ in bars], [row[field] for _, row in bars]
        width, hatch = 0.9 * _WIDTH / len(ropes), "////" if looks[rope].dashes == style.LOGN_DASHES else None
        axes.bar(
            places, values, width, color=looks[rope].color, label=rope, alpha=0.85, hatch=hatch, edgecolor="w", lw=0
        )
        for place, row in bars:
            low, high = (row.get(f"{field}_{side}") for side in ("low", "high"))
            low, high = (row[field] if bound is None else bound for bound in (low, high))
            axes.vlines(place, low, high, color=style.INK, lw=1.2)
            if len(ropes) * len(columns) <= _MOST_LABELS:
                text = f"{row['kl']:.3g}\n{row['same_top1']:.0f}% same" if field == "kl" else f"{row[field]:+.3g}"
                _label_bar(axes, text, (place, max(row[field], high, 0.0)))
    axes.margins(y=0.25)


def _label_bar(axes: Axes, text: str, place: tuple[float, float]) -> None:
    axes.annotate(text, place, xytext=(0, 3), textcoords="offset points", ha="center", fontsize=8.5)
