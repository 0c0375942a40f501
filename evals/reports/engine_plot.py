"""How much slower each rotary pair turns as different engines read a config, drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ...errors import ConfigError
from ...scaling import format_length
from ...scaling.reading import Reading, agrees
from . import style

_DASHES = ("-", "--", "-.", ":")


def plot_readings(readings: Sequence[Reading], length: int, name: str, out_stem: Path) -> tuple[Path, Path]:
    """The plain period over that of each engine, by rotary pair; engines that agree share a curve.

    Writes `out_stem`.png and .svg and returns their paths.

    Args:
        readings: the first one is what the others are held against.
        length: tokens of the text.
        name: of the model.
        out_stem: path without suffix.

    Raises:
        ConfigError: no engine takes the config.
    """
    groups = _groups(readings, length)
    if not groups:
        raise ConfigError("no engine takes this config, so there is nothing to draw")
    title = f"{name}: what engines make of its rotary config, at {format_length(length)} tokens"
    plain, colours = readings[0].rope.theta.numpy(), style.categories(len(groups) + 1)[1:]
    with style.figure(9, 4.6, title) as fig:
        axes = fig.subplots()
        style.style_axes(axes, x="rotary pair, fastest first", y="times slower than plain")
        for place, group in enumerate(groups):
            found = group[0].frequencies(length)
            assert found is not None
            label = f"{', '.join(one.engine for one in group)}: m = {found.attention_factor:.4g}"
            with np.errstate(divide="ignore", invalid="ignore"):
                slower = plain / found.inv_freq.numpy()
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


def _groups(readings: Sequence[Reading], length: int) -> list[list[Reading]]:
    """Readings that compute the same, together; those that refuse are left out."""
    groups: list[list[Reading]] = []
    for one in readings:
        if one.scaler is None:
            continue
        same = next((group for group in groups if agrees(group[0], one, length)), None)
        if same is None:
            groups.append([one])
        else:
            same.append(one)
    return groups
