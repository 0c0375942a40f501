"""What tests of plots look at: the texts of an SVG file, and whether anything is drawn."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
from PIL import Image


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
