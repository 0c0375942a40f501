"""Plots: they exist, come out the same each time, and show what is off the scale."""

from __future__ import annotations

import itertools
import math
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from PIL import Image

from ropewalk.engine.cli import cli
from ropewalk.errors import ConfigError, DataError
from ropewalk.evals import style
from ropewalk.evals.distance_plot import broken, distance_map, distances_seen
from ropewalk.evals.harm_plot import plot_harm
from ropewalk.evals.plots import Point, plot_by_position, plot_loss_curve, plot_run, plot_scaler, scale
from ropewalk.evals.result import Run
from ropewalk.evals.scaler_plot import decay, in_short
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


def drawing(spec: str, length: int, monkeypatch: pytest.MonkeyPatch, rope: RopeSpec = ROPE) -> Figure:
    """The figure of a scaler, laid out and drawn."""
    kept: list[Figure] = []

    def keep(fig: Figure, out_stem: Path) -> tuple[Path, Path]:
        FigureCanvasAgg(fig).draw()
        kept.append(fig)
        return out_stem, out_stem

    monkeypatch.setattr(style, "save", keep)
    plot_scaler(parse(spec), rope, length, Path("unused"))
    return kept[0]


def boxes(fig: Figure) -> list[tuple[str, Bbox]]:
    """Every text that shows, with the rectangle it takes."""
    found: list[Text] = [*fig.texts]
    for panel in [*fig.axes, *(child for axes in fig.axes for child in axes.child_axes)]:
        legend = panel.get_legend()
        found += [*panel.texts, panel.xaxis.label, panel.yaxis.label, *(legend.get_texts() if legend else ())]
        area = panel.get_window_extent().padded(1)
        for label in panel.get_xticklabels():
            box = label.get_window_extent()
            found += [label] if area.x0 <= (box.x0 + box.x1) / 2 <= area.x1 else []  # others are off the scale
        for label in panel.get_yticklabels():
            box = label.get_window_extent()
            found += [label] if area.y0 <= (box.y0 + box.y1) / 2 <= area.y1 else []
    return [(text.get_text(), text.get_window_extent()) for text in found if text.get_text()]


LONG_SPEC = f"longrope:4,short={'/'.join(['1'] * 32)},long={'/'.join(['2.5'] * 32)}|dual-chunk|logn"


@pytest.mark.parametrize(
    ("spec", "panels"),
    [
        ("none", 3),
        ("yarn:4|resonance", 3),
        ("rerope:512", 2),
        ("temperature:1.2", 1),
        ("rerope:512|logn", 3),
        ("logn|ntk:4", 4),
        ("dynamic-ntk|jet-long:512", 5),
        ("ntk:4|rerope:512|logn", 6),
        ("dual-chunk|resonance|temperature:0.8", 6),
        ("yarn:1.05|rerope:8100", 5),
        ("self-extend:4,window=512", 2),
        ("sink-window:1k", 2),
        (LONG_SPEC, 6),
    ],
)
def test_panels_say_what_the_scaler_sets_and_no_text_overlaps(
    spec: str, panels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for length in (32768, 300, 2) if panels == 2 else (32768,):
        fig = drawing(spec, length, monkeypatch)
        assert len(fig.axes) == panels
        assert ("d = 64" in fig.get_suptitle()) == (panels > 3 or "resonance" in spec or spec == "none")
        shown = boxes(fig)
        assert len(shown) > 10, length
        for name, box in shown:
            assert box.x0 >= 0, name
            assert box.x1 <= fig.bbox.x1, name
            assert box.y0 >= 0, name
            assert box.y1 <= fig.bbox.y1, name
        for (name, box), (other_name, other) in itertools.combinations(shown, 2):
            assert not box.overlaps(other), (name, other_name)


@pytest.mark.parametrize("spec", ["rerope:512|logn", "sink-window:1k", "self-extend:4,window=512", "temperature:1.2"])
def test_maps_and_temperatures_are_drawn(spec: str, tmp_path: Path) -> None:
    first, second = (plot_scaler(parse(spec), ROPE, 32768, tmp_path / name) for name in "ab")
    assert_drawn(first)
    assert first[1].read_bytes() == second[1].read_bytes()
    shown = " ".join(texts(first[1]))
    assert "trained length 8k" in shown
    assert ("distance seen" in shown) == (spec != "temperature:1.2")
    assert ("factor t(i)" in shown) == ("logn" in spec or "temperature" in spec)
    assert ("keys forgotten" in shown) == ("sink" in spec)
    assert ("Red: distances of 8k and more" in shown) == ("self-extend" in spec)  # it reaches 31232
    assert "wavelength" not in shown


def test_what_the_frequencies_carry_counts_as_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    short = RopeSpec(dim=64, base=1e5, trained_length=1024)
    for spec, red in (("self-extend:4,window=512", True), ("ntk:4|self-extend:4,window=512", False)):
        fig = drawing(spec, 8192, monkeypatch, rope=short)
        shown = [text for text, _ in boxes(fig)]
        assert any("never trained" in text for text in shown) == red
        assert ("carried by ntk:4: 4k" in shown) == (not red)


def literal(spec: str, i: int, j: int) -> tuple[str, float] | None:
    """The band that query i sees key j in, and the distance, written down from the definitions."""
    if spec == "rerope:6":
        return ("near", i - j) if i - j < 6 else ("far", 6)
    if spec == "sink-window:5,sinks=2":
        return ("window", i - j) if i - j < 5 else ("sinks", min(i, 6) - j) if j < 2 else None
    t, c = 7, 9
    chunks = i // t - j // t
    query = (i % t, min(i % t + t, c), c)[min(chunks, 2)]
    return ("same chunk", "chunk before", "older")[min(chunks, 2)], query - j % t


@pytest.mark.parametrize("spec", ["rerope:6", "sink-window:5,sinks=2", "dual-chunk:9,window=2"])
@pytest.mark.parametrize("length", [2, 5, 40])
def test_distances_by_brute_force(spec: str, length: int) -> None:
    bands = parse(spec).bands(RopeSpec(dim=8, base=1e4, trained_length=16))
    wanted = {i - j: literal(spec, i, j) for i in [length - 1] for j in range(length)}
    rows = distances_seen(bands, length - 1)
    got = {int(d): (row.band, seen) for row in rows for d, seen in zip(row.true, row.seen, strict=True)}
    assert got == {d: pair for d, pair in wanted.items() if pair}
    assert [row.true[0] for row in rows] == sorted(row.true[0] for row in rows)
    every = distance_map(bands, length)
    for i, j in itertools.product(range(length), repeat=2):
        pair = literal(spec, i, j) if j <= i else None
        assert np.isnan(every[i, j]) if pair is None else every[i, j] == pair[1]


def test_long_texts_are_read_at_some_places_only() -> None:
    bands = parse("rerope:512").bands(ROPE)
    near, far = distances_seen(bands, 2**20 - 1)
    assert near.true.tolist() == near.seen.tolist() == list(range(512))
    assert (far.true[0], far.true[-1]) == (512, 2**20 - 1)
    assert 1500 < len(far.true) <= 2048
    assert (np.diff(far.true) > 0).all()
    assert (far.seen == 512).all()
    sampled = distance_map(bands, 2**20, cells=64)
    i = np.arange(64) * 2**14
    np.testing.assert_array_equal(sampled, np.where(i[:, None] >= i, np.minimum(i[:, None] - i, 512), np.nan))


def test_a_line_breaks_where_a_chunk_of_keys_ends() -> None:
    rows = distances_seen(parse("dual-chunk:9,window=2").bands(RopeSpec(dim=8, base=1e4, trained_length=16)), 24)
    true, seen = broken(rows[2])  # keys 13..0, in chunks of 7
    assert np.flatnonzero(np.isnan(true)).tolist() == np.flatnonzero(np.isnan(seen)).tolist() == [7]
    assert true[~np.isnan(true)].tolist() == list(range(11, 25))
    assert seen[:7].tolist() == seen[8:].tolist() == [3, 4, 5, 6, 7, 8, 9]
    assert not np.isnan(broken(rows[1])[0]).any()


def test_in_short() -> None:
    lines = in_short(parse("rerope:512|logn"), ROPE, 32768)
    assert lines == {
        "scaler": "rerope:512|logn",
        "reach": "any length (trained 8192)",
        "bands of keys": "near from distance 0, far from distance 512",
        "largest distance": "512 seen, 32767 in truth",
        "factor on logits": f"1 for the first token, {math.log(32768) / math.log(8192):.6g} for the last of 32768",
    }
    short = RopeSpec(dim=8, base=1e4, trained_length=8)
    assert in_short(parse("logn"), short, 64)["factor on logits"] == "1 for the first token, 2 for the last of 64"
    lines = in_short(parse("ntk:4|self-extend:4,window=512"), ROPE, 65536)
    assert lines["reach"] == f"{(32768 - 512) * 4 + 512} tokens (trained 8192)"
    assert lines["wavelengths slowed"] == "fastest pair by 1, slowest by 4"
    assert lines["largest distance"] == f"{65535 // 4 + 512 - 128} seen, 65535 in truth"
    assert "factor on logits" not in lines


def test_show_from_the_shell(tmp_path: Path) -> None:
    out = tmp_path / "rope.png"
    done = CliRunner().invoke(cli, ["show", "rerope:1k|logn", "--out", str(out)], catch_exceptions=False)
    assert "largest distance     1024 seen, 32767 in truth" in done.output
    assert "wavelength" not in done.output
    assert_drawn((out, out.with_suffix(".svg")))


def test_scalers_that_cannot_be_drawn_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="length 1 leaves nothing to draw; take at least 2 tokens"):
        plot_scaler(parse("yarn:4"), ROPE, 1, tmp_path / "x")
    with pytest.raises(ConfigError, match="window 8192 is not below the length 8192 carried"):
        plot_scaler(parse("rerope:8k"), ROPE, 32768, tmp_path / "x")
    assert not list(tmp_path.iterdir())


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
    with pytest.raises(DataError, match="one setting of it; these hold 0 settings"):
        plot_harm([], run.folder / "x")


def test_harm_of_many_scalers_is_drawn_without_values(make_run: MakeRun) -> None:
    extra = {"kl": 0.1, "same_top1": 90.0, "difference": 0.125}
    run = make_run({f"yarn:{n}": {4: 3.5, 8: 3.4} for n in range(2, 9)}, protocol="harm", **extra)
    assert not any("same" in text and "%" in text for text in texts(plot_run(run)[1]) if "Scored" not in text)
