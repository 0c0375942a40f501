"""Plots of scalers: every panel says what the scaler sets, no text overlaps, and the same in short."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from drawings import assert_drawn, texts
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from ropewalk.cli.main import cli
from ropewalk.errors import ConfigError
from ropewalk.evals.reports import style
from ropewalk.evals.reports.scaler_plot import decay, in_short, plot_scaler
from ropewalk.scaling import RopeSpec, Scaler, parse

ROPE = RopeSpec(dim=64, base=1e5, trained_length=8192)


@pytest.mark.parametrize("spec", ["none", "yarn:4"])
def test_scaler(spec: str, tmp_path: Path) -> None:
    paths = plot_scaler(parse(spec), ROPE, 32768, tmp_path / "rope")
    assert_drawn(paths)
    shown = " ".join(texts(paths[1]))
    assert "trained length 8k" in shown
    assert "target length 32k" in shown
    assert ("leaves the frequencies" in shown) == (spec == "none")
    assert ("multiplied by 1.139" in shown) == (spec == "yarn:4")


def test_svg_is_the_same_each_time(tmp_path: Path) -> None:
    first, second = (plot_scaler(parse("yarn:4|rerope:512|logn"), ROPE, 32768, tmp_path / name)[1] for name in "ab")
    assert first.read_bytes() == second.read_bytes()
    assert b"<dc:date>" not in first.read_bytes()


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
        fig.draw_without_rendering()
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
    shown = " ".join(texts(plot_scaler(parse(spec), ROPE, 32768, tmp_path / "rope")[1]))
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
    with pytest.raises(ConfigError, match="window 8192 must be below 8192, the length"):
        plot_scaler(parse("rerope:8k"), ROPE, 32768, tmp_path / "x")
    assert not list(tmp_path.iterdir())
