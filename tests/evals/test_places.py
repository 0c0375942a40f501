"""Places that are added until the differences are known: the rows are those of `fixed-target` with so many samples."""

import io
import itertools
import math
import re

import numpy as np
import pytest
from byte_model import WORDS, text, tiny_model
from rich.console import Console

import ropewalk as rw
from ropewalk.evals.models.local import LocalModel
from ropewalk.evals.models.measured import Start
from ropewalk.evals.protocols.fixed_target import FixedTarget
from ropewalk.evals.protocols.perplexity_cell import Source, cells
from ropewalk.evals.protocols.places import GrowingPlaces, _counts
from ropewalk.evals.runs.measure import measure_all
from ropewalk.evals.runs.result import Run
from ropewalk.evals.statistics import paired_difference
from ropewalk.scaling import parse

ROPES = [parse("none"), parse("yarn:2", 64)]
LINES = [f"line {n}: " + WORDS[7 * n : 7 * n + 120] for n in range(5)]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def read(monkeypatch):
    """The windows that models read, each with its scaler."""
    windows, losses = [], LocalModel.losses

    def counted(self, ids, *more):
        windows.append((str(self.rope), tuple(ids)))
        return losses(self, ids, *more)

    monkeypatch.setattr(LocalModel, "losses", counted)
    return windows


@pytest.fixture
def measured(model):
    return LocalModel(model)


def growing(local, *documents, interval=0.02, most=8, contexts=(64, 96), target=16, ropes=ROPES):
    plan = FixedTarget(contexts=contexts, target=target, samples=most)
    source = Source.of(text(*documents), local.tokenizer, plan)
    return GrowingPlaces(local, source, ropes, plan, interval)


def carry_out(places, folder, deadline=None):
    console = Console(record=True, width=200, file=io.StringIO())
    run = Run(folder)
    outcome = places.measure(run, console, deadline)
    return run, outcome, console.export_text()


def final(run):
    return [row for row in run.rows if row["task"] == "ppl"]


@pytest.mark.parametrize("documents", [(WORDS,), tuple(LINES)])
def test_the_rows_are_those_of_fixed_target_with_as_many_samples_and_every_place_is_read_once(
    tmp_path, model, measured, read, documents
):
    run, outcome, shown = carry_out(growing(measured, *documents, interval=1e-6), tmp_path / "growing")
    count = 8 if len(documents) == 1 else 5
    assert len(read) == len(set(read)) == 4 * count
    plain = Run(tmp_path / "plain")
    for cell in cells(
        LocalModel(model), text(*documents), ROPES, FixedTarget(contexts=(64, 96), target=16, samples=count)
    ):
        cell.measure(LocalModel(model).under(cell.scaler), plain, lambda past, new: None)
    same = ("key", "context", "rope", "places", "tokens", "tokens_sha256", "loss", "loss_low", "loss_high", "samples")
    assert [{k: row[k] for k in same} for row in final(run)] == [{k: row[k] for k in same} for row in plain.rows]
    for row in final(run):
        np.testing.assert_array_equal(run.losses(row), plain.losses(row))
    assert outcome.left_out == []
    assert "4 places: " in shown
    assert f"{count} places: " in shown
    assert f"No more places: {2 * count} would come next, and at most 8 samples were asked for." in shown


def test_it_stops_when_the_differences_are_known(tmp_path, measured):
    run, _, shown = carry_out(growing(measured, WORDS, interval=100, target=32), tmp_path)
    assert {row["documents"] for row in final(run)} == {4}
    assert re.search(
        r"4 places: every difference is known well enough. The least certain: \S+ at \d+ differs by", shown
    )
    assert "8 places" not in shown


def test_how_well_the_differences_are_known(tmp_path, measured):
    """Of the pairs with the untouched model at its trained length, the one that needs most places; a tenth of the
    difference is narrow enough."""
    places = growing(measured, WORDS, most=4, target=32, interval=0.001)
    run, _, shown = carry_out(places, tmp_path)
    losses = {(row["rope"], row["context"]): run.losses(row) for row in final(run)}
    excess = {}
    for key, values in losses.items():
        if key != ("none", 64):
            mean, low, high = paired_difference(values, losses["none", 64])
            excess[key] = (high - low) / max(0.001, 0.1 * abs(mean))
    assert len(excess) == 3
    rope, context = max(excess, key=excess.get)
    assert f"4 places: {rope} at {context} differs by" in shown
    assert f"about {math.ceil(4 * excess[rope, context] ** 2)} places would be enough" in shown
    assert abs(np.mean(losses[rope, context] - losses["none", 64])) > 0.01, "the tenth does not count"


def test_losses_that_are_not_finite_ask_for_no_more_places(tmp_path, measured, monkeypatch):
    losses = LocalModel.losses

    def lost(self, *args):
        return losses(self, *args) * (math.nan if str(self.rope) == "yarn:2" else 1)

    monkeypatch.setattr(LocalModel, "losses", lost)
    run, _, shown = carry_out(growing(measured, WORDS, contexts=(64,)), tmp_path / "all")
    assert [row["loss"] is None for row in final(run)] == [False, True]
    assert "4 places: no difference is finite" in shown and "8 places" not in shown
    _, _, shown = carry_out(growing(measured, WORDS, interval=100, target=32), tmp_path / "one")
    assert "4 places: every difference is known well enough. The least certain: none at 96" in shown


def test_a_finished_run_reads_nothing_again_and_more_places_read_only_the_new_ones(tmp_path, measured, read):
    carry_out(growing(measured, WORDS, interval=1e-6, most=4), tmp_path)
    assert len(read) == 16
    carry_out(growing(measured, WORDS, interval=1e-6, most=4), tmp_path)
    assert len(read) == 16
    run, _, _ = carry_out(growing(measured, WORDS, interval=1e-6, most=8), tmp_path)
    assert len(read) == 32
    assert [row["documents"] for row in final(run)] == [4] * 4 + [8] * 4


def test_what_is_complete_when_the_time_is_up_is_stored(tmp_path, measured, monkeypatch):
    from ropewalk.evals.protocols import places

    calls = []

    def limited(*args, **settings):
        calls.append(args[1])
        return measure_all(*args, **settings | ({"deadline": 0.0} if len(calls) == 2 else {}))

    monkeypatch.setattr(places, "measure_all", limited)
    run, outcome, shown = carry_out(growing(measured, WORDS, interval=1e-6), tmp_path)
    assert [row["documents"] for row in final(run)] == [4] * 4
    assert outcome.left_out == []
    assert "There was no time for 8 places." in shown


def test_without_time_for_the_first_places_the_cells_are_left_out(tmp_path, measured):
    run, outcome, _ = carry_out(growing(measured, WORDS), tmp_path, deadline=0.0)
    assert run.rows == []
    assert [(str(cell.scaler), cell.context) for cell in outcome.left_out] == [
        *(("none", 64), ("none", 96)),
        *(("yarn:2", 64), ("yarn:2", 96)),
    ]


@pytest.mark.parametrize("documents", range(1, 12))
@pytest.mark.parametrize("most", [1, 3, 4, 7, 30, 64])
def test_counts_at_least_double_and_keep_their_places(documents, most):
    protocol = FixedTarget(contexts=(8,), target=2, samples=most)
    source = Source(
        documents=[list(range(200 + 13 * n)) for n in range(documents)],
        start=Start(prefix=[], token=None),
        name="",
        sha256="",
    )
    counts = _counts(source, protocol)
    assert counts
    assert max(counts) <= most
    before = set()
    for count in counts:
        windows = FixedTarget(contexts=(8,), target=2, samples=count).windows(source.documents, 8, source.start)
        places = {window.place for window in windows}
        assert before <= places
        assert len(places) == count
        before = places
    assert all(later >= 2 * count or later == documents for count, later in itertools.pairwise(counts))


def test_a_text_without_room_ends_the_counts():
    """64 tokens hold seven windows of 16 whose last 8 tokens are not scored twice."""
    protocol = FixedTarget(contexts=(16,), target=8, samples=64)
    source = Source(documents=[list(range(64))], start=Start(prefix=[], token=None), name="", sha256="")
    assert _counts(source, protocol) == [4]


@pytest.mark.parametrize(("letters", "most", "room", "wanted"), [(330, 64, 4, 8), (128, 4, 2, 4)])
def test_a_text_without_room_is_named_as_the_reason(tmp_path, measured, letters, most, room, wanted):
    run, _, shown = carry_out(growing(measured, WORDS[:letters], interval=1e-6, most=most), tmp_path)
    assert {row["documents"] for row in final(run)} == {room}
    assert f"No more places: the text has no room for {wanted}; a longer one may have." in shown


@pytest.mark.parametrize("interval", [0, -1, math.nan, math.inf])
def test_intervals_that_make_no_sense(measured, interval):
    with pytest.raises(rw.ConfigError, match=r"interval .* must be above 0 nats"):
        growing(measured, WORDS, interval=interval)


@pytest.mark.parametrize(("ropes", "contexts"), [(ROPES[1:], (64, 96)), (ROPES[:1], (64,)), (ROPES[:1], (32, 96))])
def test_something_must_be_paired(measured, ropes, contexts):
    with pytest.raises(rw.ConfigError, match=r"to the untouched model; measure .*none.* and another scaler or length"):
        growing(measured, WORDS, ropes=ropes, contexts=contexts)
