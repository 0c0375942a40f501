"""The objective `key-tokens` of `tune`: which tokens count, and that only they rank what was read."""

import json

import numpy as np
import pytest
from copier import VOCABULARY, copier

import ropewalk as rw
from ropewalk.errors import ConfigError, DataError
from ropewalk.evals.data import load_text
from ropewalk.evals.models.measured import FunctionModel
from ropewalk.evals.protocols import longppl
from ropewalk.evals.protocols.protocol import Window
from ropewalk.evals.runs.result import Run
from ropewalk.evals.tuning.key_tokens import choose, judge
from ropewalk.evals.tuning.report import as_json, ranking_grid, sentences

L, TARGET, SCORED = 128, 512, 64
NEAR, FAR, BEYOND = range(448, 456), range(456, 480), range(480, 504)  # which context tells these tokens


def document(seed, *, has_far=True):
    """Its last 64 tokens repeat what stands 4, 60 and 380 tokens before; the last 8 are new."""
    ids = np.random.default_rng(seed).permutation(VOCABULARY - 1)[:TARGET].tolist()
    for places, distance in ((NEAR, 4), (FAR, 60), (BEYOND, 380)):
        for place in places if has_far or places is not FAR else ():
            ids[place] = ids[place - distance]
    return ids


def judged(tmp_path, documents, prefix):
    cut = [prefix + ids[len(prefix) :] for ids in documents]
    windows = [Window(ids=ids, first=TARGET - SCORED, place=f"{n}:{TARGET}") for n, ids in enumerate(cut)]
    cell, run = judge(windows, L, prefix, {"model": "copier"}), Run(tmp_path)
    cell.measure(FunctionModel(copier, name="copier", trained_length=L), run, lambda past, count: None)
    return cell, windows, run


@pytest.mark.parametrize("prefix", [[], [VOCABULARY - 1]])
def test_key_tokens_need_more_than_the_short_context_and_no_more_than_the_trained_length(tmp_path, prefix):
    cell, windows, run = judged(tmp_path, [document(0), document(1, has_far=False), document(2)], prefix)
    assert {len(window.ids) for window in cell.full} == {L}
    assert {len(window.ids) for window in cell.short} == {L // 8}
    assert all(window.ids[: len(prefix)] == prefix for window in (*cell.short, *cell.full))
    keys = choose(cell, windows, run)
    assert list(keys) == ["0:512", "2:512"]  # the other place has none
    for mask in keys.values():
        assert (np.flatnonzero(mask) + TARGET - SCORED).tolist() == list(FAR)[1:]  # nothing says that a copy begins


def test_a_text_without_key_tokens_is_refused(tmp_path):
    cell, windows, run = judged(tmp_path, [document(1, has_far=False)], [])
    with pytest.raises(DataError, match=r"from 16 to 128 of context.*16 are needed, and the text has at most 0 among"):
        choose(cell, windows, run)


def test_only_key_tokens_rank_what_was_read(tiny_folder, held_out_texts, tmp_path, monkeypatch):
    monkeypatch.setattr(longppl, "GAIN", 0.5)
    monkeypatch.setattr(longppl, "MOST_LOSS", 4.0)
    for number, source in enumerate(sorted(held_out_texts, key=len)[-6:]):
        (tmp_path / f"{number}.py").write_text(source, encoding="utf-8")
    text, folder = load_text(tmp_path), tmp_path / "run"
    model = rw.load(tiny_folder, dtype="float32", max_length=2**31)
    seen = []

    def stop(progress):
        seen.append(progress.round)
        if progress.round == "skim":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rw.tune(model, 512, text=text, objective="key-tokens", out=folder, progress=stop)
    assert seen == ["judge", "skim"]
    tuned = rw.tune(model, 512, text=text, objective="key-tokens", out=folder)
    run = Run(folder)
    short, full = [row for row in run.rows if row["task"] == "judge"]
    assert (short["context"], full["context"]) == (32, 256)
    gained = run.losses(short) - run.losses(full) > 0.5
    keys = np.split(gained & (run.losses(full) < 4.0), 9)
    places = full["places"].split(",")
    kept = {place: mask for place, mask in zip(places, keys, strict=True) if mask.sum() >= 16}
    assert len(kept) >= 3 and sum(mask.sum() for mask in kept.values()) < 9 * 64
    stored = {(row["rope"], row["places"]): run.losses(row) for row in run.rows if row["task"] == "tune"}
    for candidate in tuned.ranking:
        for place, losses in candidate.read.items():
            assert losses.tolist() == stored[str(candidate.scaler), place][kept[place]].tolist()
    assert set(tuned.winner.read) == set(kept)
    everywhere = [c for c in tuned.ranking if set(c.read) == set(kept)]
    assert len(everywhere) >= 3 and tuned.ranking[0].loss == min(c.loss for c in everywhere)
    assert as_json(tuned)["objective"] == "key-tokens"
    assert "nats per key token" in sentences(tuned)[0] and ranking_grid(tuned).title.endswith("nats per key token")
    assert json.loads(json.dumps(as_json(rw.tune(model, 512, text=text, objective="key-tokens", out=folder)))) == (
        json.loads(json.dumps(as_json(tuned)))
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "key"}, "unknown objective 'key'; choose one of loss, key-tokens"),
        (
            {"objective": "key-tokens", "search": "factors"},
            "search='factors' ranks by skims, .*use search='methods' or objective='loss'",
        ),
    ],
)
def test_objectives_that_make_no_sense(tiny_folder, settings, message):
    with pytest.raises(ConfigError, match=message):
        rw.tune(rw.load(tiny_folder, dtype="float32"), 512, **settings)
