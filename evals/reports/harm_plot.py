"""The plot of `harm`: what each scaler costs texts that the model could read without it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes

from ...errors import DataError
from ..protocols.harm import Harm
from ..runs import compare
from ..runs.result import Row
from . import style

_PANELS = {"kl": "KL(untouched || scaled), nats", "difference": "loss difference, nats"}
_MOST_LABELS = 12  # bars of a panel that have room for their values
_WIDTH = 0.8  # of a group of bars, of the distance between groups


def plot_harm(rows: Sequence[Row], out_stem: Path) -> tuple[Path, Path]:
    """KL and loss difference at every context, a bar for each scaler; writes `out_stem`.png and .svg, returns both.

    Args:
        rows: one setting of `harm`.
        out_stem: path without suffix.

    Raises:
        DataError: nothing to draw, or rows measured in different ways.
    """
    groups = compare.settings(row for row in rows if row.get("loss") is not None)
    if len(groups) != 1 or groups[0][0]["protocol"] != Harm.name:
        raise DataError(f"a plot of harm needs measured rows of one setting of it; these hold {len(groups)} settings")
    (group,) = groups
    row = group[0]
    with style.figure(
        9,
        6.6,
        f"What scaling costs within the trained length: {compare.short(row['model'])} on {compare.short(row['text'])}",
    ) as fig:
        panels = fig.subplots(len(_PANELS), 1, sharex=True)
        for axes, field in zip(panels, _PANELS, strict=True):
            _draw(axes, group, field)
        panels[-1].set_xlabel("context (tokens)")
        many = min(len(compare.methods(group)), 5)
        panels[0].legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=many, frameon=False, borderpad=0)
        note = f"Scored: {Harm.scored(row)}. Lines: 95% intervals; same: likeliest next token."
        fig.supxlabel(note, **style.FOOTNOTE)
        return style.save(fig, out_stem)


def _draw(axes: Axes, group: Sequence[Row], field: str) -> None:
    ropes, columns = compare.methods(group), compare.columns(group)
    style.style_axes(axes, x="", y=_PANELS[field])
    axes.axhline(0, color=style.MUTED, linewidth=0.8)
    axes.set_xticks(range(len(columns)), list(columns.values()))
    axes.tick_params(axis="x", length=0)
    looks = style.line_styles(ropes)
    for index, rope in enumerate(ropes):
        step = (index - (len(ropes) - 1) / 2) * _WIDTH / len(ropes)
        found = [(n + step, compare.measured(group, rope, at)) for n, at in enumerate(columns)]
        bars = [(place, row) for place, row in found if row is not None]
        places, values = [place for place, _ in bars], [row[field] for _, row in bars]
        axes.bar(places, values, 0.9 * _WIDTH / len(ropes), color=looks[rope].color, label=rope, alpha=0.85)
        for place, row in bars:
            low, high = (row.get(f"{field}_{side}") for side in ("low", "high"))
            low, high = (row[field] if bound is None else bound for bound in (low, high))
            axes.vlines(place, low, high, color=style.INK, lw=1.2)
            if len(ropes) * len(columns) <= _MOST_LABELS:
                text = f"{row['kl']:.3g}\n{row['same_top1']:.0f}% same" if field == "kl" else f"{row[field]:+.3g}"
                _label(axes, text, (place, max(row[field], high, 0.0)))
    axes.margins(y=0.25)


def _label(axes: Axes, text: str, place: tuple[float, float]) -> None:
    axes.annotate(text, place, xytext=(0, 3), textcoords="offset points", ha="center", fontsize=8.5)
