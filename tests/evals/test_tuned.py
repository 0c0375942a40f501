"""Which candidate is named, from losses that are made up; and which candidates there are."""

import json

import numpy as np
import pytest

from ropewalk.evals.runs.compare import Difference
from ropewalk.evals.tuning.candidates import (
    Candidate,
    Tuned,
    difference,
    fits_config,
    neighbours,
    ranked,
    simplicity,
    starting_points,
)
from ropewalk.evals.tuning.report import as_json, sentences
from ropewalk.scaling import METHODS, RopeSpec, parse

ROPE = RopeSpec(dim=64, base=1e5, trained_length=8192)
TOKENS = 256


def candidate(spec, read=(), skimmed=(), **more):
    """Losses by place: of every place the same tokens are hard for everyone, and later places are harder."""

    def losses(means):
        losses = {}
        for place, mean in enumerate(means):
            rng = np.random.default_rng(place)
            hardness = rng.gamma(1.2, 1.0, TOKENS)
            noise = np.random.default_rng([place, *spec.encode()]).normal(0, 0.02, TOKENS)
            values = hardness - hardness.mean() + noise - noise.mean() + mean + place
            losses[f"0:{place}"] = values.astype(np.float32)
        return losses

    return Candidate(scaler=parse(spec), read=losses(read), skimmed=losses(skimmed), **more)


def tuned(*candidates, keep_short=False):
    return Tuned(target=16384, rope=ROPE, ranking=tuple(ranked(candidates)), keep_short=keep_short, complete=True)


def order(*candidates):
    return [str(c.scaler) for c in ranked(candidates)]


def test_those_who_came_farther_rank_first_and_those_who_came_as_far_by_loss():
    assert order(
        candidate("none", skimmed=[6]),
        candidate("yarn:2", skimmed=[3.2]),
        candidate("linear:2", read=[3.9], skimmed=[3.3]),
        candidate("ntk:4", read=[3.5, 3.5], skimmed=[3.4]),
        candidate("dual-chunk", read=[3.4, 3.4], skimmed=[3.1]),
    ) == ["dual-chunk", "ntk:4", "linear:2", "yarn:2", "none"]


def test_nobody_gains_by_the_places_that_others_have_read():
    """The third place is harder for all; the one that read it is held against the other on the first two."""
    far, near = candidate("yarn:2", read=[3.0, 3.0, 3.0]), candidate("ntk:4", read=[3.1, 3.1])
    assert far.loss > near.loss
    assert order(near, far) == ["yarn:2", "ntk:4"]
    assert order(candidate("ntk:4", read=[2.9, 2.9]), far) == ["ntk:4", "yarn:2"]


def test_differences_are_over_shared_places_and_read_ones_before_skimmed():
    a, b = candidate("yarn:2", read=[3.0, 3.0], skimmed=[9.0]), candidate("ntk:4", read=[3.1], skimmed=[8.0])
    assert difference(a, b).mean == pytest.approx(-0.1, abs=1e-6)
    assert difference(a, candidate("linear:2", skimmed=[9.5])).mean == pytest.approx(-0.5, abs=1e-6)
    assert difference(candidate("yarn:2"), b) is None


def test_the_simplest_of_those_that_cannot_be_told_apart():
    result = tuned(
        candidate("rerope:4k|logn", read=[3.000] * 3),
        candidate("rerope:4k", read=[3.001] * 3),
        candidate("ntk-mixed:3", read=[3.0015] * 3),
        candidate("yarn:2", read=[3.05] * 3),
    )
    assert str(result.winner.scaler) == "rerope:4k|logn"
    assert [str(c.scaler) for c in result.ties] == ["rerope:4k|logn", "rerope:4k", "ntk-mixed:3"]
    assert str(result.simplest.scaler) == "ntk-mixed:3"  # yarn is simpler, and distinguishably worse
    assert str(result.servable.scaler) == "ntk-mixed:3"
    assert any("Not distinguishable from it on the same tokens: rerope:4k, ntk-mixed:3" in s for s in sentences(result))


def test_passkeys_decide_among_ties_and_only_there():
    result = tuned(
        candidate("rerope:4k", read=[3.000] * 3, passkeys={0.1: 0.0, 0.9: 1.0}),
        candidate("dual-chunk", read=[3.001] * 3, passkeys={0.1: 1.0, 0.9: 1.0}),
        candidate("yarn:2", read=[3.2] * 3, passkeys={0.1: 1.0, 0.9: 1.0}),
    )
    assert str(result.winner.scaler) == "dual-chunk"


def test_harm_counts_only_where_it_is_asked():
    harm = Difference(mean=0.015, low=0.005, high=0.025)
    harmful, careful = candidate("ntk:4", read=[3.0], harm=harm), candidate("rerope:4k", read=[3.3])
    careful.harm = Difference(mean=0.0, low=0.0, high=0.0)
    unknown = candidate("yarn:2", read=[2.9])
    assert str(tuned(harmful, careful).winner.scaler) == "ntk:4"
    assert str(tuned(harmful, careful, unknown, keep_short=True).winner.scaler) == "rerope:4k"
    assert str(tuned(harmful, candidate("none", read=[6.0]), keep_short=True).winner.scaler) == "none"
    assert tuned(harmful, keep_short=True).eligible == []


def test_too_few_tokens_for_an_interval_are_told_by_their_mean():
    few = {"0:0": np.array([3.0, 3.0], np.float32)}, {"0:0": np.array([3.1, 3.1], np.float32)}
    better, worse = (Candidate(scaler=parse(s), read=r) for s, r in zip(("ntk:4", "none"), few, strict=True))
    result = tuned(better, worse)
    assert result.ties == [better]
    assert as_json(result)["ranking"][1]["difference"] == [pytest.approx(0.1), None, None]


def test_what_was_only_skimmed_is_not_named_beside_what_was_read():
    result = tuned(candidate("yarn:2", read=[3.4], skimmed=[3.4]), candidate("ntk:4", skimmed=[3.0]))
    assert str(result.winner.scaler) == str(result.servable.scaler) == "yarn:2"


@pytest.mark.parametrize("target", [9000, 16384, 32768])
@pytest.mark.parametrize("rope", [ROPE, RopeSpec(dim=128, base=5e5, trained_length=4096)], ids=["smollm2", "llama"])
def test_starting_points_are_all_different_and_work(rope, target):
    scalers = starting_points(rope, target)
    assert len({str(scaler) for scaler in scalers}) == len(scalers) > 25
    for scaler in scalers:
        scaler.check(rope)
        scaler.frequencies(rope, target)
        if scaler.member("positions"):
            assert scaler.reach(rope) >= target
    named = {part.name for scaler in scalers for part in scaler.parts}
    ours = {name for name, method in METHODS.built_in.items() if method.facet in ("frequencies", "positions")}
    assert ours - named == {
        *("dynamic-ntk", "dynamic-yarn"),  # at the target length they are ntk and yarn
        *("base", "longrope", "cope"),  # need numbers or training of their own
        *("string", "sink-window"),  # do not lengthen what is read
    }


def test_a_scaler_that_differs_by_layer_can_be_tried():
    scaler = parse("yarn:2@0-9|yarn:4@10-")
    assert not fits_config(scaler, ROPE) and simplicity(scaler, ROPE) == (3, 2)
    assert {str(n) for n in neighbours(scaler)} == {"yarn:2@0-9|yarn:4@10-|logn"}


def test_neighbours_differ_in_one_thing():
    assert {str(n) for n in neighbours(parse("yarn:2"))} == {"yarn:2.38", "yarn:1.68", "yarn:2|logn"}
    assert {str(n) for n in neighbours(parse("rerope:512|logn"))} == {
        "rerope:724|logn",
        "rerope:362|logn",
        "rerope:512",
    }
    assert {str(n) for n in neighbours(parse("self-extend:3,window=64"))} == {
        "self-extend:4,window=64",
        "self-extend:2,window=64",
        "self-extend:3,window=91",
        "self-extend:3,window=45",
        "self-extend:3,window=64|logn",
    }
    assert {str(n) for n in neighbours(parse("yarn:1"))} == {"yarn:1.19", "yarn:1|logn"}  # a factor below 1 is none
    assert neighbours(parse("none")) == []


def test_simplicity_and_what_a_config_holds():
    specs = ["none", "yarn:2", "ntk-mixed:2", "rerope:4k", "rerope:4k|logn"]
    assert sorted({*specs}, key=lambda spec: simplicity(parse(spec), ROPE)) == specs
    assert [fits_config(parse(spec), ROPE) for spec in specs] == [True, True, True, False, False]


@pytest.mark.parametrize("lost", [np.nan, np.inf])
def test_losses_that_are_not_finite_rank_last_and_tie_with_nothing(lost):
    good = [candidate("linear:2", read=[3.0]), candidate("ntk:4", read=[2.0]), candidate("ntk:8", read=[1.0])]
    bad = [candidate("yarn:2", read=[lost]), candidate("dual-chunk", read=[lost])]
    for place in range(4):
        result = tuned(*good[:place], *bad, *good[place:])
        assert [str(c.scaler) for c in result.ranking[:3]] == ["ntk:8", "ntk:4", "linear:2"]
        assert result.ties == [good[2]]
    assert tuned(*bad).ties == bad[:1]
    assert json.dumps(as_json(tuned(*good, *bad)), allow_nan=False)


def test_a_difference_that_is_only_skimmed_says_so():
    """A skim said -1.998 where reading gave -1.497, in a sentence after one about losses that were read."""

    def last_sentence(**plain):
        result = tuned(candidate("yarn:2", read=[3.0], skimmed=[3.0]), candidate("none", **plain))
        return next(s for s in sentences(result) if s.startswith("Against the untouched model"))

    assert last_sentence(skimmed=[5.0]).endswith("), skimmed.")
    assert last_sentence(read=[4.5], skimmed=[5.0]).endswith("interval -1.503 to -1.497).")
