"""Plots of losses: they exist, come out the same each time, and show what is off the scale."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from drawings import assert_drawn, texts
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from ropewalk.errors import DataError
from ropewalk.evals.reports import style
from ropewalk.evals.reports.loss_plots import Point, plot_by_position, plot_harm, plot_loss_curve, plot_run, scale
from ropewalk.evals.runs.result import Run

MakeRun = Callable[..., Run]


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


def test_no_line_crosses_the_trained_length_where_it_was_not_measured(make_run: MakeRun, tmp_path, monkeypatch) -> None:
    """Such a line would rise from the last short context on, as if the model began to fail there."""
    drawn: list[Figure] = []
    monkeypatch.setattr(style, "save", lambda figure, stem: (drawn.append(figure), (stem, stem))[1])
    for losses in ({2: 3.5, 12: 4.2}, {2: 3.5, 8: 3.4, 12: 4.2}):
        run = make_run({"none": losses})
        plot_loss_curve(run.rows, run, tmp_path / "loss")
    joined = [
        [line.get_xdata() for line in figure.axes[0].lines if line.get_linestyle() == "--" and len(line.get_xdata())]
        for figure in drawn
    ]
    assert [[list(xs) for xs in lines] for lines in joined] == [[[2048], [12288]], [[2048, 8192, 12288]]]
    intervals = [[c for c in figure.axes[0].collections if isinstance(c, LineCollection)] for figure in drawn]
    assert [len(lines) for lines in intervals] == [2, 0], "a lone point has no band"


def test_svg_is_the_same_each_time(smollm_run: Run, tmp_path: Path) -> None:
    first, second = (plot_loss_curve(smollm_run.rows, smollm_run, tmp_path / name)[1] for name in "ab")
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


def test_harm_has_a_bar_for_every_scaler_and_context(make_run: MakeRun) -> None:
    extra = {"kl": 0.0188, "kl_low": 0.015, "kl_high": 0.02, "same_top1": 87.5}
    extra |= {"difference": -0.25, "difference_low": None, "difference_high": None}
    run = make_run({"yarn:2": {4: 3.5, 8: 3.4}, "linear:2": {8: 4.3, 4: None}}, protocol="harm", **extra)
    png, svg = plot_run(run)
    assert png.name == "harm.png"
    assert_drawn((png, svg))
    shown = texts(svg)
    assert shown.count("-0.25") == 3  # the axis writes a true minus sign
    assert {"yarn:2", "linear:2", "4k", "8k"} <= {*shown}
    assert any("88% same" in text for text in shown)
    with pytest.raises(DataError, match="one group of it; these hold 0 groups"):
        plot_harm([], run.folder / "x")


def test_harm_of_many_scalers_is_drawn_without_values(make_run: MakeRun) -> None:
    extra = {"kl": 0.1, "same_top1": 90.0, "difference": 0.125}
    run = make_run({f"yarn:{n}": {4: 3.5, 8: 3.4} for n in range(2, 9)}, protocol="harm", **extra)
    assert not any("% same" in text for text in texts(plot_run(run)[1]))


def test_one_context_is_drawn_as_bars_of_the_difference(make_run: MakeRun) -> None:
    run = make_run({"none": {8: 3.5}, "yarn:2": {8: 3.54}, "yarn:2|logn": {8: 3.49}})
    paths = plot_run(run)
    assert_drawn(paths)
    shown = texts(paths[1])
    assert {"yarn:2  +0.040", "yarn:2|logn  \u22120.010", "Loss at 8k: toy on novel"} <= {*shown}
    assert "loss less that of the untouched model (nats per token)" in shown


def test_one_context_without_the_untouched_model_is_drawn_as_bars_of_the_loss(make_run: MakeRun) -> None:
    shown = texts(plot_run(make_run({"yarn:2": {8: 3.54}}))[1])
    assert {"yarn:2  3.540", "loss (nats per token)"} <= {*shown}


def test_the_trained_length_as_the_longest_context_is_named_beside_its_line(make_run: MakeRun) -> None:
    run = make_run({"none": {2: 3.6, 4: 3.55, 8: 3.5}, "yarn:2": {2: 3.62, 8: 3.51}})
    assert "trained length 8k" in texts(plot_run(run)[1])  # and the fixture sees that no text is over another
