"""How plots look: colours that are a method's own, and labels that keep apart."""

from __future__ import annotations

import numpy as np

from ropewalk.evals.reports import style


def test_colours_are_fixed_and_distinct() -> None:
    ropes = ["none", "linear:2", "ntk:4", "ntk-mixed:2", "yarn:2", "yarn:4", "rerope:4k|logn", "selfextend:4"]
    looks = style.line_styles(ropes)
    assert looks["none"].color == style.INK
    assert looks["none"].dashes != "-"
    assert len({look.color for look in looks.values()}) == len(ropes)
    assert style.line_styles(["yarn:8"])["yarn:8"].color == looks["yarn:2"].color
    many = style.line_styles([f"yarn:{n}" for n in range(1, 25)])
    assert len({(look.color, look.marker) for look in many.values()}) == 24


def test_a_colour_and_dashes_mean_one_thing_whatever_else_is_drawn() -> None:
    alone = style.line_styles(["none", "self-extend:8", "self-extend:8|logn", "logn"])
    among = style.line_styles(["yarn:2|logn", "dual-chunk|logn", "self-extend:8|logn", "rerope:64", "self-extend:8"])
    assert alone["self-extend:8"].color == among["self-extend:8"].color == among["self-extend:8|logn"].color
    dashes = {rope: look.dashes for rope, look in (alone | among).items()}
    assert {rope for rope, dash in dashes.items() if dash == style.LOGN_DASHES} == {
        "self-extend:8|logn", "logn", "yarn:2|logn", "dual-chunk|logn",
    }  # fmt: skip
    assert alone["logn"].color == alone["none"].color == style.INK


def test_labels_are_spread_without_crossing() -> None:
    wanted = [0.5, 0.51, 0.1, 0.49, 0.97]
    places = style.spread(wanted, 0.05)
    assert places[2] == 0.1
    assert places[4] == 0.97
    np.testing.assert_allclose(sorted(places), [0.1, 0.45, 0.5, 0.55, 0.97])
    assert np.argsort(places).tolist() == np.argsort(wanted).tolist()
