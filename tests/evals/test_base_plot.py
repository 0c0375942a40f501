"""The picture of the bases: what it shows is computed from every distance."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from drawings import assert_drawn, texts

from ropewalk.errors import ConfigError
from ropewalk.evals.reports.rope_plots import curves, plot_bases
from ropewalk.scaling import RopeSpec
from ropewalk.scaling.base import base_rules

ROPE = RopeSpec(dim=64, base=1e4, trained_length=512)


def test_bases_are_drawn_with_their_failures(tmp_path: Path) -> None:
    rules = base_rules(ROPE, 2048)
    paths = plot_bases(rules, ROPE, 2048, tmp_path / "base")
    assert_drawn(paths)
    shown = texts(paths[1])
    assert {"trained length 512", "2k", "own base  10,000", "carries all"} <= {*shown}
    assert [text for text in shown if text.startswith("fails at ")] == [
        f"fails at {rule.fails_at}" for rule in rules if rule.fails_at is not None
    ]
    again = plot_bases(rules, ROPE, 2048, tmp_path / "again")
    assert again[1].read_bytes() == paths[1].read_bytes()


def test_steps_hold_the_lowest_of_all_their_distances() -> None:
    for curve in curves(base_rules(ROPE, 2048), 64, 2048):
        theta = curve.base ** (-2 * np.arange(32) / 64)
        f = np.cos(np.arange(2048)[:, None] * theta).sum(1)
        pairs = zip(curve.edges[:-1], curve.edges[1:], strict=True)
        assert np.abs(curve.least - [f[start:stop].min() for start, stop in pairs]).max() < 1e-9
        failing = np.flatnonzero(curve.least < 0)
        if curve.fails_at is None:
            assert not len(failing)
        else:
            assert curve.edges[failing[0]] <= curve.fails_at < curve.edges[failing[0] + 1]


def test_rules_of_one_base_share_a_curve(tmp_path: Path) -> None:
    """At the trained length NTK and the critical base change nothing."""
    rules = base_rules(ROPE, 512)
    found = curves(rules, 64, 512)
    assert found[0].name.startswith("own base, NTK-aware, critical base")
    assert len({curve.base for curve in found}) == len(found)
    assert len({(curve.look.color, curve.look.dashes) for curve in found}) == len(found)
    assert_drawn(plot_bases(rules, ROPE, 512, tmp_path / "base"))


def test_one_token_is_no_picture(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="length 1 leaves nothing to draw"):
        plot_bases((), ROPE, 1, tmp_path / "base")
