"""The plot of `continuation`: next-byte bits and finished tokens, by method and kind of cut."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes

from ..reports import style
from .table import Summary

_PANELS = {"next_byte_bits": "next-byte bits (less is better)", "finished": "share of cut tokens finished"}
_WIDTH = 0.8  # of a group of bars, of the distance between groups


def plot_continuation(summaries: Sequence[Summary], model: str, out_stem: Path) -> tuple[Path, Path]:
    """Bars with 95% intervals; writes `out_stem`.png and .svg and returns their paths."""
    with style.figure(9, 7.2, f"Prompts cut inside tokens: {model}") as fig:
        panels = fig.subplots(len(_PANELS), 1, sharex=True)
        for axes, field in zip(panels, _PANELS, strict=True):
            _draw(axes, summaries, field)
        handles, labels = panels[-1].get_legend_handles_labels()
        above = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0}
        panels[0].legend(handles, labels, ncols=len(labels), frameon=False, **above)
        note = "Bars: means over cuts; lines: 95% intervals. Of transformers' healing only the text can be seen."
        fig.supxlabel(note, **style.FOOTNOTE)
        return style.save(fig, out_stem)


def _draw(axes: Axes, summaries: Sequence[Summary], field: str) -> None:
    names = list(dict.fromkeys(summary.name for summary in summaries))
    methods = list(dict.fromkeys(summary.method for summary in summaries))
    style.style_axes(axes, x="", y=_PANELS[field])
    axes.set_xticks(range(len(names)), [_label(name, summaries) for name in names])
    axes.tick_params(axis="x", length=0)
    colors = dict(zip(methods, style.categories(len(methods)), strict=True))
    for method in methods:
        shown = [s for s in summaries if s.method == method and field in s.values]
        step = (methods.index(method) - (len(methods) - 1) / 2) * _WIDTH / len(methods)
        places = [names.index(s.name) + step for s in shown]
        values = [s.values[field] for s in shown]
        axes.bar(places, [v.mean for v in values], 0.9 * _WIDTH / len(methods), color=colors[method], label=method)
        known = [(x, v) for x, v in zip(places, values, strict=True) if not math.isnan(v.low)]
        axes.vlines([x for x, _ in known], [v.low for _, v in known], [v.high for _, v in known], color=style.INK, lw=1)
    axes.set_ylim(bottom=0)


def _label(name: str, summaries: Sequence[Summary]) -> str:
    text, _, kind = name.partition(", ")
    cuts = next(s.cuts for s in summaries if s.name == name)
    return f"{text}\n{textwrap.fill(kind, 16)}\n({cuts} cuts)"
