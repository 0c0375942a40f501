"""The search for LongRoPE factors: its space, its optimum, the rounds around it."""

import functools
import json
import math
import shutil

import numpy as np
import pytest
import torch

import ropewalk as rw
from ropewalk.errors import ConfigError, DataError
from ropewalk.evals.data import Text
from ropewalk.evals.runs.result import Run
from ropewalk.evals.tuning import rounds as tune_rounds
from ropewalk.evals.tuning import text as tune_text
from ropewalk.evals.tuning.factor_search import FactorSpace, project, search_factors
from ropewalk.evals.tuning.report import as_json, ranking_grid, sentences
from ropewalk.evals.tuning.rounds import SEARCHED
from ropewalk.evals.tuning.tune import tune
from ropewalk.scaling import hf, hf_write
from ropewalk.scaling.longrope import LongRoPE
from ropewalk.scaling.rope import RopeSpec
from ropewalk.scaling.spec import parse

TINY = RopeSpec(dim=32, base=10_000.0, trained_length=256)
LARGE = RopeSpec(dim=128, base=500_000.0, trained_length=8192)
STILL = RopeSpec(dim=64, base=10_000.0, trained_length=1024, rotating_pairs=8)


@pytest.fixture(scope="module")
def model(tiny_folder):
    return rw.load(tiny_folder, max_length=2**31)


@pytest.fixture(scope="module")
def text(held_out_texts):
    return Text(name="held-out", documents=tuple(filter(None, held_out_texts)), sha256="ab" * 32)


@pytest.mark.parametrize("rope", [TINY, LARGE, STILL])
@pytest.mark.parametrize("largest", [None, 1.5, 40.0])
@pytest.mark.parametrize("sigma", [0.1, 1, 30])
def test_every_point_is_in_order_and_within_bounds(rope, largest, sigma):
    space = FactorSpace.around(parse("yarn:4"), rope, 4 * rope.trained_length, largest)
    rng = np.random.default_rng(0)
    for point in rng.normal(0, sigma, (50, space.dimension)):
        scaler = space.scaler(point)
        scaler.check(rope)
        assert scaler.short == scaler.long == tuple(sorted(scaler.long))
        assert scaler.long[0] >= 1 and scaler.long[-1] <= space.largest
        assert parse(str(scaler)) == scaler  # what names a measurement tells the point
        assert torch.isfinite(scaler.frequencies(rope).inv_freq).all()


def test_the_projection_is_the_nearest_point():
    """Against all others: the inner product with any way into the set is not above 0 (the obtuse-angle criterion)."""
    rng = np.random.default_rng(1)
    for _ in range(200):
        wild = rng.normal(0.7, 1.0, 16)
        near = project(wild, 4.0)
        other = np.sort(rng.uniform(0, math.log(4), 16))
        assert (wild - near) @ (other - near) <= 1e-9


@pytest.mark.parametrize(
    "spec", ["none", "yarn:4", "mrrope:4", "llama3:4", "ntk:8", "linear:4", "dynamic-ntk:4", "yarn:6"]
)
@pytest.mark.parametrize("rope", [TINY, LARGE, STILL])
def test_the_search_starts_at_the_frequencies_of_the_closed_form(spec, rope):
    start, target = parse(spec), 4 * rope.trained_length
    space = FactorSpace.around(start, rope, target)
    frequencies, wanted = (s.frequencies(rope, target) for s in (space.scaler(np.zeros(space.dimension)), start))
    torch.testing.assert_close(frequencies.inv_freq, wanted.inv_freq, rtol=1e-5, atol=0)
    assert frequencies.attention_factor == pytest.approx(wanted.attention_factor, rel=1e-5)


def test_a_largest_factor_bounds_the_start_too():
    space = FactorSpace.around(parse("ntk:8"), TINY, 1024, 3.0)
    assert space.scaler(np.zeros(space.dimension)).long[-1] == 3.0
    for wrong in (1.0, 0.5, math.inf, math.nan):
        with pytest.raises(ConfigError, match=r"above 1.*for example 4, the ratio of target and trained length"):
            FactorSpace.around(parse("none"), TINY, 1024, wrong)


@pytest.mark.parametrize("rope, share", [(TINY, 0.02), (LARGE, 0.15)])
def test_a_known_optimum_is_found(rope, share):
    """A bowl around a ramp of factors, and m = 1.1; with 65 numbers it comes near in 40 generations."""
    wanted = np.clip(np.linspace(-0.3, 1.6, rope.dim // 2), 0, math.log(4))

    def bowl(scaler: LongRoPE) -> float:
        return float(np.mean((np.log(scaler.long) - wanted) ** 2)) + (math.log(scaler.attention_factor / 1.1)) ** 2

    space = FactorSpace.around(parse("linear:4"), rope, 4 * rope.trained_length)
    factors = search_factors(space, lambda scalers: [bowl(scaler) for scaler in scalers])
    assert factors.loss == bowl(factors.scaler)
    assert factors.loss < share * factors.start_loss
    assert factors.evaluations <= 1 + 40 * 16


def test_it_ends_where_all_is_alike_and_where_there_is_no_time():
    space = FactorSpace.around(parse("yarn:4"), TINY, 1024)
    flat = search_factors(space, lambda scalers: [2.0] * len(scalers))
    assert flat.evaluations < 20 and flat.scaler == space.scaler(np.zeros(space.dimension))
    assert search_factors(space, lambda _: None) is None
    left = iter([[3.0]])
    stopped = search_factors(space, lambda _: next(left, None))
    assert stopped.evaluations == 1 and stopped.loss == stopped.start_loss == 3.0


@pytest.fixture(scope="module")
def small():
    """Two closed forms, two generations at two places, three places that are read: seconds."""
    patch = pytest.MonkeyPatch()
    patch.setattr(tune_rounds, "search_factors", functools.partial(search_factors, generations=2))
    patch.setattr(tune_rounds, "starting_points", lambda *_: [parse("mrrope:4"), parse("ntk:8")])
    patch.setattr(tune_rounds, "neighbours", lambda _: [])
    patch.setattr(tune_rounds, "_DEPTHS", (0.5,))
    patch.setattr(tune_text, "MOST_PLACES", 3)
    patch.setattr(tune_text, "_SEARCHED", 256)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def searched(small, model, text, tmp_path_factory):
    """The outcome at 4x and its run."""
    folder = tmp_path_factory.mktemp("whole")
    return tune(model, "4x", text=text, search="factors", out=folder), Run(folder)


def test_the_searched_factors_are_at_least_as_good_as_their_start_where_they_were_searched(searched):
    tuned, run = searched
    winner = next(c for c in tuned.ranking if c.name == SEARCHED)
    skimmed = [row for row in run.rows if row["task"] == "skim"]
    read = {row["places"] for row in run.rows if row["task"] == "tune"}
    places = {row["places"] for row in skimmed if row["rope"].startswith("longrope")} - read
    losses = {}
    for row in skimmed:
        if row["places"] in places:
            losses.setdefault(row["rope"], []).append(row["loss"])
    means = {rope: np.mean(values) for rope, values in losses.items()}
    closed = {"mrrope:4", "ntk:8"}
    start = next(rope for rope in means if rope not in closed)  # the first that was measured there
    assert len(places) == 2 and len(means) >= 25
    assert means[str(winner.scaler)] == min(means.values()) < means[start]
    best = min(closed, key=means.__getitem__)
    frequencies = [parse(scaler).frequencies(tuned.rope).inv_freq for scaler in (start, best)]
    torch.testing.assert_close(*frequencies, rtol=1e-5, atol=0)


def test_they_are_searched_where_harm_counts_too(searched, small, model, text, tmp_path):
    _, run = searched
    shutil.copytree(run.folder, tmp_path / "run")
    careful = tune(model, "4x", text=text, search="factors", keep_short=True, ropes=["none"], out=tmp_path / "run")
    assert [c.harm is not None for c in careful.ranking if c.name == SEARCHED] == [True]


def test_they_are_read_at_places_where_they_were_not_searched(searched):
    tuned, _ = searched
    winner = next(c for c in tuned.ranking if c.name == SEARCHED)
    assert winner.places == 3 and len(winner.skimmed) == 3 and winner.harm is not None
    assert sum(c.name == SEARCHED for c in tuned.ranking) == 1


def test_a_search_that_was_stopped_finds_the_same(searched, small, model, text, tmp_path):
    whole, run = searched
    steps = []

    def stop(step):
        steps.append(step.round)
        if steps.count("factors") == 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(model, "4x", text=text, search="factors", out=tmp_path, progress=stop)
    again = []

    def note(step):
        again.append(step.round)

    resumed = tune(model, "4x", text=text, search="factors", out=tmp_path, progress=note)
    assert as_json(resumed) == as_json(whole)
    assert {row["key"] for row in Run(tmp_path).rows} == {row["key"] for row in run.rows}
    keys = [json.loads(line)["key"] for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(keys) == len({*keys}) and again.count("factors") > 0, "what was measured was found again"


def test_a_config_holds_the_searched_factors(searched):
    tuned, _ = searched
    scaler = next(c for c in tuned.ranking if c.name == SEARCHED).scaler
    written = hf_write.write(tuned.rope, scaler)
    back = hf.read(
        {"model_type": "llama", "rope_parameters": written, "max_position_embeddings": 1024, "head_dim": 32}
    )[None]
    for length in (100, 1024):
        original, theirs = scaler.frequencies(tuned.rope, length), back.scaler.frequencies(back.rope, length)
        assert torch.equal(original.inv_freq, theirs.inv_freq) and original.attention_factor == theirs.attention_factor


def test_people_see_a_short_name_and_programs_the_spec(searched):
    tuned, _ = searched
    output = " ".join(sentences(tuned)) + ranking_grid(tuned).to_markdown()
    assert SEARCHED in output and "/" not in output.replace("and/or", "")
    listed = next(candidate for candidate in as_json(tuned)["ranking"] if candidate["label"] == SEARCHED)
    assert parse(listed["rope"]) == next(c for c in tuned.ranking if c.name == SEARCHED).scaler


def test_what_cannot_be_searched_is_refused(model, text, tiny_folder):
    plain = rw.load(tiny_folder, compile=False, max_length=2**31)
    with pytest.raises(ConfigError, match="needs skimming, and only compiled models can skim"):
        tune(plain, "4x", text=text, search="factors")
    with pytest.raises(ConfigError, match="unknown search 'all'; choose one of methods, factors"):
        tune(model, "4x", text=text, search="all")
    with pytest.raises(ConfigError, match="largest_factor 8 bounds searched factors"):
        tune(model, "4x", text=text, largest_factor=8)
    with pytest.raises(ConfigError, match="largest_factor 1 must be"):
        tune(model, "4x", text=text, search="factors", largest_factor=1)
    with pytest.raises(DataError, match="and all of them are read; a search needs others"):
        tune(
            model,
            "4x",
            text=Text(name="short", documents=(max(text.documents, key=len)[:2200],), sha256="cd" * 32),
            search="factors",
        )
