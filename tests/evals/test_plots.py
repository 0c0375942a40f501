"""Plots: they exist, come out the same each time, and show what is off the scale."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ropewalk.errors import DataError
from ropewalk.evals import style
from ropewalk.evals.plots import Point, plot_by_position, plot_loss_curve, plot_run, plot_scaler, scale
from ropewalk.evals.result import Run
from ropewalk.evals.scaler_plot import decay
from ropewalk.scaling import RopeSpec, Scaler, parse

MakeRun = Callable[..., Run]
ROPE = RopeSpec(dim=64, base=1e5, trained_length=8192)


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


def test_loss_curve(smollm_run: Run, tmp_path: Path) -> None:
    paths = plot_loss_curve(smollm_run.rows, smollm_run, tmp_path / "loss.v1")
    assert [path.name for path in paths] == ["loss.v1.png", "loss.v1.svg"]
    assert_drawn(paths)
    shown = texts(paths[1])
    for text in ("2k", "8k", "16k", "24k", "trained length 8k", "context (tokens)"):
        assert text in shown
    assert "6.10" in shown  # off the scale at 16k, marked with its value
    assert "none  7.50" in shown
    assert "rerope:4k|logn  3.47 at 16k" in shown
    assert "Loss against context: toy on novel" in shown


def test_svg_is_the_same_each_time(smollm_run: Run, tmp_path: Path) -> None:
    first, second = (plot_loss_curve(smollm_run.rows, smollm_run, tmp_path / name)[1] for name in "ab")
    assert first.read_bytes() == second.read_bytes()
    first, second = (plot_scaler(parse("yarn:4"), ROPE, 32768, tmp_path / name)[1] for name in "ab")
    assert first.read_bytes() == second.read_bytes()
    assert b"<dc:date>" not in first.read_bytes()


def test_by_position(make_run: MakeRun, tmp_path: Path) -> None:
    for start, end, plain, scaled in ((1, 256, 4.5, 4.5), (256, 8192, 3.5, 3.51), (8192, 12288, 5.0, 3.5)):
        run = make_run(
            {"none": {12: plain}, "a": {12: scaled}}, protocol="by-position", bucket_start=start, bucket_end=end
        )
    paths = plot_by_position(run.rows, tmp_path / "p")
    assert_drawn(paths)
    assert {"256", "8k", "12k", "none  5.00", "position in the text (tokens)"} <= {*texts(paths[1])}


@pytest.mark.parametrize("spec", ["none", "yarn:4", "ntk:8", "dynamic-ntk"])
def test_scaler(spec: str, tmp_path: Path) -> None:
    paths = plot_scaler(parse(spec), ROPE, 32768, tmp_path / "rope")
    assert_drawn(paths)
    shown = " ".join(texts(paths[1]))
    assert "trained length 8k" in shown
    assert "target length 32k" in shown
    assert ("leaves the frequencies" in shown) == (spec == "none")
    assert ("multiplied by 1.139" in shown) == (spec == "yarn:4")


def test_scaler_at_the_trained_length_and_with_still_pairs(tmp_path: Path) -> None:
    still = RopeSpec(dim=64, base=1e5, trained_length=8192, rotating_pairs=8)
    assert_drawn(plot_scaler(Scaler(), still, 8192, tmp_path / "rope"))


def test_decay_by_brute_force() -> None:
    """Up to the first step that holds more than one distance, every value is f(m) itself."""
    w = ROPE.theta.numpy()
    middle, mean, least, greatest = decay(w, 4096)
    assert middle[0] == 1
    for m, value in zip(middle[:8], mean[:8], strict=True):
        assert value == pytest.approx(sum(math.cos(m * x) for x in w))
    every = np.cos(np.outer(np.arange(1, 4096), w)).sum(axis=1)
    assert least.min() == pytest.approx(every.min())
    assert greatest.max() == pytest.approx(every.max())


def test_first_negative_distance_of_llama2() -> None:
    """d = 128, b = 1e4: f(m) is first negative at m = 1707."""
    w = RopeSpec(dim=128, base=1e4, trained_length=4096).theta.numpy()
    assert decay(w, 1707)[2].min() >= 0
    assert decay(w, 1709)[2].min() < 0


def test_scale_is_not_flattened_by_what_broke() -> None:
    curves = {
        "none": [Point(x=2048, loss=3.55), Point(x=8192, loss=3.5), Point(x=16384, loss=12.0)],
        "yarn:2": [Point(x=8192, loss=3.6, low=3.55, high=3.65), Point(x=16384, loss=4.4)],
    }
    bottom, top = scale(curves, 8192)
    assert 3.4 < bottom < 3.5
    assert 4.4 < top < 4.6


def test_scale_when_everything_broke() -> None:
    bottom, top = scale({"a": [Point(x=16384, loss=9.0), Point(x=32768, loss=9.5)]}, 8192)
    assert bottom < 9.0
    assert 9.5 < top < 9.7


def test_scale_keeps_the_short_contexts_of_the_untouched_model() -> None:
    curves = {"none": [Point(x=256, loss=5.0), Point(x=8192, loss=3.5)], "a": [Point(x=256, loss=9.0)]}
    assert 5.0 < scale(curves, 8192)[1] < 5.2


def test_colours_are_fixed_and_distinct() -> None:
    ropes = ["none", "linear:2", "ntk:4", "ntk-mixed:2", "yarn:2", "yarn:4", "rerope:4k|logn", "selfextend:4"]
    looks = style.line_styles(ropes)
    assert looks["none"].color == style.INK
    assert looks["none"].dashes != "-"
    assert len({look.color for look in looks.values()}) == len(ropes)
    assert style.line_styles(["yarn:8"])["yarn:8"].color == looks["yarn:2"].color
    many = style.line_styles([f"yarn:{n}" for n in range(1, 13)])
    assert len({(look.color, look.dashes) for look in many.values()}) == 12


def test_labels_are_spread_without_crossing() -> None:
    wanted = [0.5, 0.51, 0.1, 0.49, 0.97]
    places = style.spread(wanted, 0.05)
    assert places[2] == 0.1
    assert places[4] == 0.97
    np.testing.assert_allclose(sorted(places), [0.1, 0.45, 0.5, 0.55, 0.97])
    assert np.argsort(places).tolist() == np.argsort(wanted).tolist()


def test_every_setting_gets_its_plot(make_run: MakeRun) -> None:
    make_run({"none": {8: 3.5, 16: 6.0}})
    make_run({"none": {8: 3.5}}, protocol="sliding", stride=256)
    make_run({"none": {8: None}}, protocol="truncate")
    run = make_run({"none": {8: 3.5}}, protocol="by-position", bucket_start=4096, bucket_end=8192)
    names = [path.name for path in plot_run(run)]
    assert names == [f"{stem}.{kind}" for stem in ("loss", "loss_2", "loss_by_position") for kind in ("png", "svg")]
    assert all((run.folder / name).stat().st_size > 1000 for name in names)


def test_what_cannot_be_drawn_is_refused(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run({"none": {8: None}})
    with pytest.raises(DataError, match="hold 0"):
        plot_loss_curve(run.rows, run, tmp_path / "x")
    run = make_run({"none": {8: 3.5}})
    with pytest.raises(DataError, match="no position buckets"):
        plot_by_position(run.rows, tmp_path / "x")
