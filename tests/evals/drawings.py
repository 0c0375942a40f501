"""What tests of plots look at: the texts of an SVG file, and whether anything is drawn."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

_TOUCHING = 2  # pixels that two texts may share: the boxes of letters without descenders are empty there


def texts(svg: Path) -> list[str]:
    tree = ET.parse(svg)
    return ["".join(element.itertext()).strip() for element in tree.iter("{http://www.w3.org/2000/svg}text")]


def assert_drawn(paths: tuple[Path, Path]) -> None:
    png, svg = paths
    assert png.suffix == ".png"
    with Image.open(png) as image:
        assert image.width == 1800
        assert np.asarray(image.convert("L")).std() > 5
    assert svg.suffix == ".svg"
    assert texts(svg)


def overlaps(fig: Figure) -> list[tuple[str, str]]:
    """Texts of a figure that are written over one another."""
    fig.draw_without_rendering()
    axes = [axis for one in fig.axes for axis in (one.xaxis, one.yaxis)]
    ticks = {id(label) for axis in axes for tick in _ticks(axis) for label in (tick.label1, tick.label2)}
    shown = {id(label) for axis in axes for tick in axis._update_ticks() for label in (tick.label1, tick.label2)}
    found = [
        (text.get_text(), text.get_window_extent().padded(-_TOUCHING / 2))
        for text in fig.findobj(Text)
        if text.get_visible() and text.get_text().strip() and (id(text) not in ticks or id(text) in shown)
    ]
    return [(a, b) for n, (a, one) in enumerate(found) for b, other in found[:n] if one.overlaps(other)]


def _ticks(axis):
    return [*axis.get_major_ticks(), *axis.get_minor_ticks()]
