"""The protocols against a few independent lines of plain transformers, on a tiny model."""

import hashlib
import math
import struct

import numpy as np
import pytest
import torch
from byte_model import WORDS, losses, measure, run_plan, text, tiny_model
from rich.console import Console
from transformers import Gemma3TextConfig, MistralConfig

import ropewalk as rw
from ropewalk.evals.contexts.endless import EndlessCell
from ropewalk.evals.models.local import LocalModel
from ropewalk.evals.models.measured import ForwardCost, Start
from ropewalk.evals.protocols import harm
from ropewalk.evals.protocols.by_name import PROTOCOLS, protocol, settings_of
from ropewalk.evals.protocols.fixed_target import FixedTarget
from ropewalk.evals.protocols.harm import Harm
from ropewalk.evals.protocols.longppl import JudgeCell, LongPPL
from ropewalk.evals.protocols.perplexity_cell import cells
from ropewalk.evals.protocols.whole_text import ByPosition, Sliding, Truncate, position_edges
from ropewalk.evals.reports.report import publish
from ropewalk.evals.retrieval.cells import cells as retrieval_cells
from ropewalk.evals.retrieval.tasks import TASKS
from ropewalk.evals.runs.measure import measure_all
from ropewalk.evals.runs.result import Run, recipe_key
from ropewalk.evals.tuning.candidates import Candidate, Tuned
from ropewalk.evals.tuning.text import SkimCell
from ropewalk.scaling import Linear, Scaler, parse


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("scaler", ["none", "yarn:4"])
def test_fixed_target(tmp_path, bos, scaler):
    model = tiny_model(bos)
    plan = FixedTarget(contexts=(32, 64, 128), target=16, samples=2)
    run = run_plan(tmp_path, model, plan, WORDS, scaler=scaler)
    ids = list(model.tokenizer(WORDS, add_special_tokens=False).input_ids)
    start = [256] if bos else []
    ends = [len(ids) // 2, len(ids)]
    model.rope = None
    with rw.patch(model.hf, scaler):
        for row in run.rows:
            windows = [start + ids[end - row["context"] + len(start) : end] for end in ends]
            assert all(len(w) == row["context"] for w in windows)
            expected = np.concatenate([losses(model, w)[-16:] for w in windows])
            assert np.allclose(run.losses(row), expected, atol=1e-4)
            assert row["loss"] == pytest.approx(expected.mean(), abs=1e-4)
            assert row["tokens"] == 32
            assert row["bits_per_byte"] == pytest.approx(expected.sum() / math.log(2) / 32, abs=1e-3)
            assert row["places"] == f"0:{ends[0]},0:{ends[1]}"


def test_fixed_target_scores_the_same_tokens_at_every_context_and_uses_documents_that_are_long_enough(
    tmp_path,
):
    model = tiny_model()
    plan = FixedTarget(contexts=(32, 128), target=16, samples=3)
    documents = (WORDS[:100], WORDS[:400], WORDS[400:900])
    planned = cells(LocalModel(model), text(*documents), [Scaler()], plan)
    targets = [[w.ids[w.first :] for w in cell.windows] for cell in planned]
    assert targets[0] == targets[1]
    assert [w.place for w in planned[0].windows] == ["1:200", "2:250", "1:400"]


def test_no_token_is_scored_twice_and_fewer_samples_are_told_once(tmp_path, caplog):
    """Samples in the first 800 tokens, or less than 100 apart, are one place."""
    document = list(range(1000))
    plan = FixedTarget(contexts=(200, 800), target=100, samples=8)
    for context in plan.contexts:
        windows = plan.windows([document, document[::-1]], context, Start(prefix=[], token=None))
        assert [w.place for w in windows] == ["0:800", "1:800", "0:1000", "1:1000"]
        assert len({token for w in windows[::2] for token in w.ids[w.first :]}) == 200
    harm = Harm(contexts=(200, 400), samples=5)
    assert [w.place for w in harm.windows([document], 200, Start(prefix=[], token=None))] == ["0:400", "0:800"]
    model = tiny_model()
    assert run_plan(tmp_path, model, FixedTarget(contexts=(64, 128), target=16, samples=2), WORDS).rows
    assert not caplog.records
    (row,) = run_plan(tmp_path / "b", model, FixedTarget(contexts=(64,), target=32, samples=99), WORDS[:640]).rows
    assert (row["tokens"], row["documents"]) == (32 * 18, 18)
    assert [r.message for r in caplog.records] == [
        "fixed-target: words has room for 18 of 99 samples if no token is scored twice"
    ]


def test_cells_of_other_windows_are_other_cells():
    """The longest context decides where windows end: the first of twenty cannot end at 95 in both."""
    model = tiny_model()
    short, long = (
        cells(LocalModel(model), text(WORDS), [Scaler()], FixedTarget(contexts=contexts, target=16, samples=20))[0]
        for contexts in ((32,), (32, 100))
    )
    assert [w.place for w in short.windows[1:]] == [w.place for w in long.windows[1:]]
    assert short.recipe["places"].startswith("20 windows to 0:1910, sha256 ")
    assert recipe_key(short.recipe) != recipe_key(long.recipe)


def test_by_position_buckets_hold_every_token_once(tmp_path):
    model = tiny_model()
    run = run_plan(tmp_path, model, ByPosition(contexts=(600,), samples=2), WORDS, WORDS[7:])
    expected = [losses(model, model._encode(d)[:600]) for d in (WORDS, WORDS[7:])]
    assert [(r["bucket_start"], r["bucket_end"]) for r in run.rows] == [(1, 256), (256, 512), (512, 600)]
    for row in run.rows:
        part = np.concatenate([e[row["bucket_start"] - 1 : row["bucket_end"] - 1] for e in expected])
        assert np.allclose(run.losses(row), part, atol=1e-4)
    assert sum(row["tokens"] for row in run.rows) == 2 * 599


def test_other_weights_at_the_same_path_are_measured_anew(tmp_path):
    first, plan = tiny_model(), FixedTarget(contexts=(64,), target=16)
    run = run_plan(tmp_path, first, plan, WORDS)
    other = tiny_model(uniform=True)  # of the same name
    for model, is_done in ((tiny_model(), True), (other, False)):
        (cell,) = cells(LocalModel(model), text(WORDS), [Scaler()], plan)
        assert cell.is_done(run) == is_done


def test_auto_is_told_by_what_it_stands_for_and_measured_anew_when_that_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("ROPEWALK_CACHE", str(tmp_path / "cache"))
    model, auto = tiny_model(), parse("auto")
    plan = FixedTarget(contexts=(64, 128), target=16)

    def planned():
        model.rope = None
        found = cells(LocalModel(model), text(WORDS), [Scaler(), auto], plan)
        asked = retrieval_cells(LocalModel(model), [TASKS["passkey"]], [auto], contexts=[1024], depths=[0.5], trials=1)
        return [*found, *asked]

    default, far = "self-extend:8,window=32", "self-extend:64,window=32"
    before = planned()
    assert [(cell.recipe["rope"], cell.recipe.get("chosen")) for cell in before] == [
        *(("none", None), ("none", None), ("auto", "none"), ("auto", default), ("auto", far))
    ]
    run = Run(tmp_path / "run")
    measure(model, before[3], run)
    best = Candidate(scaler=parse("yarn:2"), read={"0:9": np.ones(64, np.float32)})
    tuned = Tuned(target=128, rope=model.spec, ranking=(best,), keep_short=False, complete=True)
    model.remember(tuned.as_stored(text="words"))
    after = planned()
    assert [cell.recipe.get("chosen") for cell in after] == [None, None, "none", "yarn:2", far]
    assert before[3].is_done(run) and not after[3].is_done(run)
    longppl = LongPPL(contexts=(128,), target=16, judge="auto")
    judge, cell = cells(LocalModel(model), text(WORDS), [Scaler()], longppl)
    assert judge.recipe["chosen"] == "none, yarn:2" and cell.recipe["judge"] == "none, yarn:2 at 128"


@pytest.fixture
def broken(monkeypatch):
    """A model whose losses are NaN at 64 tokens."""
    losses = LocalModel.losses

    def broken(model, ids, *more):
        return losses(model, ids, *more) * (np.nan if len(ids) == 64 else 1)

    monkeypatch.setattr(LocalModel, "losses", broken)
    return tiny_model()


def test_a_loss_that_is_not_finite_does_not_end_the_run(tmp_path, broken):
    run, plan = Run(tmp_path), FixedTarget(contexts=(64, 128), target=16)
    with (tmp_path / "told").open("w") as file:
        measure_all(
            LocalModel(broken), cells(LocalModel(broken), text(WORDS), [Scaler()], plan), run, Console(file=file)
        )
    lost, found = run.rows
    assert (lost["loss"], lost["perplexity"], lost["reason"]) == (None, None, "loss is not finite")
    assert found["loss"] > 0 and "reason" not in found
    assert "loss is not finite, 16 tokens scored" in (tmp_path / "told").read_text()
    assert "loss is not finite" in publish(run, title="broken")[0].read_text()
    by_position = run_plan(tmp_path / "b", broken, ByPosition(contexts=(64,)), WORDS)
    assert by_position.rows[0]["loss"] is None


def test_other_numbers_that_are_not_finite_are_told_in_place_of_the_loss(tmp_path, monkeypatch):
    compare = harm.compare_distributions
    monkeypatch.setattr(
        harm,
        "compare_distributions",
        lambda *given: [part * np.nan if n == 2 else part for n, part in enumerate(compare(*given))],
    )
    run = run_plan(tmp_path, tiny_model(), Harm(contexts=(64,)), WORDS, scaler="yarn:2")
    assert (run.rows[0]["kl"], run.rows[0]["loss"], run.rows[0]["reason"]) == (None, None, "kl is not finite")
    assert "kl is not finite" in publish(run, title="broken")[0].read_text()


def test_outcomes_without_a_finite_loss():
    rows = [{"loss": None, "context": 64, "cache_mb": 1.0}, {"loss": 2.0, "context": 128, "cache_mb": 1.0}]
    assert JudgeCell.outcome(None, rows) == "loss is not finite at 64, loss 2.0000 at 128"
    assert SkimCell.outcome(None, rows) == "loss is not finite, skimmed"
    assert EndlessCell.outcome(None, rows[::-1]) == "loss is not finite at the end, cache 1 to 1 MB"


def test_rows_tell_which_tokens_were_scored(tmp_path):
    """The same ids give the same hash, whatever the context and the scaler."""

    def digest(ids):
        return hashlib.sha256(b"".join(struct.pack("<q", token) for token in ids)).hexdigest()[:16]

    model = tiny_model()
    plan = FixedTarget(contexts=(32, 64), target=16, samples=2)
    rows = [row for scaler in ("none", "yarn:4") for row in run_plan(tmp_path, model, plan, WORDS, scaler=scaler).rows]
    ids = model._encode(WORDS)
    middle = len(ids) // 2
    assert {row["tokens_sha256"] for row in rows} == {digest([*ids[middle - 16 : middle], *ids[-16:]])}
    buckets = run_plan(tmp_path / "b", model, ByPosition(contexts=(300,)), WORDS).rows
    assert [row["tokens_sha256"] for row in buckets] == [digest(ids[1:256]), digest(ids[256:300])]


@pytest.mark.parametrize("context", [2, 255, 256, 257, 8192])
def test_bucket_edges_cover_the_context(context):
    edges = position_edges(context)
    assert edges[0] == 1
    assert edges[-1] == context
    assert list(edges) == sorted(set(edges))


@pytest.mark.parametrize(
    ("context", "stride", "length"), [(64, 16, 200), (64, 64, 200), (64, 64, 192), (64, 7, 100), (64, 16, 40)]
)
def test_sliding_scores_each_token_once_with_the_context_it_should_have(tmp_path, context, stride, length):
    model = tiny_model()
    plan = Sliding(contexts=(context,), stride=stride, text_tokens=length)
    run = run_plan(tmp_path, model, plan, WORDS)
    ids = model._encode(WORDS)[:length]
    expected = list(losses(model, ids[:context]))
    end = context
    while end < length:  # token by token: the window that ends at the next multiple of the stride
        new_end = min(end + stride, length)
        window = ids[max(0, new_end - context) : new_end]
        expected += list(losses(model, window)[-(new_end - end) :])
        end = new_end
    assert np.allclose(run.losses(run.rows[0]), expected, atol=1e-4)


def test_stride_equal_to_the_window_is_disjoint(tmp_path):
    """With a start token as context, disjoint windows score every token."""
    model = tiny_model(bos=True)
    plan = Sliding(contexts=(65,), stride=64, text_tokens=192)
    run = run_plan(tmp_path, model, plan, WORDS)
    ids = list(model.tokenizer(WORDS, add_special_tokens=False).input_ids)[:192]
    expected = np.concatenate([losses(model, [256, *ids[s : s + 64]]) for s in (0, 64, 128)])
    assert np.allclose(run.losses(run.rows[0]), expected, atol=1e-4)


def test_truncate_scores_the_beginning_of_each_document(tmp_path):
    model = tiny_model()
    documents = (WORDS, WORDS[:50], WORDS[13:])
    run = run_plan(tmp_path, model, Truncate(contexts=(100,), samples=2), *documents)
    expected = np.concatenate([losses(model, model._encode(d)[:100]) for d in (WORDS, WORDS[13:])])
    assert np.allclose(run.losses(run.rows[0]), expected, atol=1e-4)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_uniform_model_gives_exactly_log2_of_the_vocabulary(tmp_path, monkeypatch, name):
    monkeypatch.setattr(
        "ropewalk.evals.protocols.longppl.key_tokens", lambda short, full: np.arange(len(full)) % 2 == 0
    )
    settings = {"target": 32, "stride": 16, "text_tokens": 200, "judge": "none"}
    contexts = (64, 80) if name == "longppl" else (64,)
    plan = protocol(name, contexts, **{key: value for key, value in settings.items() if key in settings_of(name)})
    run = run_plan(tmp_path, tiny_model(uniform=True), plan, WORDS)
    assert run.rows
    for row in (row for row in run.rows if row["task"] == "ppl"):
        assert row["loss"] / math.log(2) == pytest.approx(math.log2(257), abs=1e-6)
        assert row["bits_per_byte"] == pytest.approx(math.log2(257), abs=1e-6)  # a token is a byte
        assert row["perplexity"] == pytest.approx(257, rel=1e-6)


@pytest.mark.parametrize("chunk", [1, 7, 32, 1000])
def test_results_do_not_depend_on_the_chunk_or_on_the_order_of_cells(tmp_path, monkeypatch, chunk):
    plan = FixedTarget(contexts=(64, 128), target=48)
    whole = run_plan(tmp_path / "a", tiny_model(), plan, WORDS, scaler="dynamic-ntk")
    monkeypatch.setattr("ropewalk.engine.runners.runner.CHUNK", chunk)
    model, chunked = tiny_model(), Run(tmp_path / "b")
    for cell in reversed(cells(LocalModel(model), text(WORDS), [parse("linear:3"), parse("dynamic-ntk")], plan)):
        measure(model, cell, chunked)
    for row in whole.rows:
        found = chunked.find({k: row[k] for k in row if k in _recipe_fields(model, plan)})
        assert np.allclose(chunked.losses(found), whole.losses(row), atol=2e-5)


def _recipe_fields(model, plan):
    return cells(LocalModel(model), text(WORDS), [Scaler()], plan)[0].row_recipes()[0].keys()


def test_the_head_in_small_chunks_is_the_head_at_once(monkeypatch):
    model = tiny_model()
    ids = model._encode(WORDS)[:150]
    whole = model.score_ids(ids, first=20)
    monkeypatch.setattr("ropewalk.engine.prefill.LOGITS_BUDGET", 257 * 3)
    assert torch.allclose(model.score_ids(ids, first=20), whole, atol=2e-5)
    assert torch.allclose(whole, -torch.from_numpy(losses(model, ids)[19:]).float(), atol=1e-4)


@pytest.mark.parametrize("plan", [ByPosition, Truncate, Harm])
@pytest.mark.parametrize("prefix", [[], [256], [256, 257]])
def test_tokens_before_the_text_are_not_scored(plan, prefix):
    """Some tokenizers add two, such as that of GLM-4. The first of all tokens has none before it."""
    (window,) = plan(contexts=(64,)).windows([[*range(100)]], 64, Start(prefix=prefix, token=None))
    assert window.ids[: len(prefix)] == prefix
    assert window.first == max(len(prefix), 1)
    assert len(window.ids) == 64


def test_user_mistakes():
    model = tiny_model()
    with pytest.raises(rw.DataError, match=r"too short: 1 document\(s\) of 8k tokens needed, it has 0"):
        cells(LocalModel(model), text(WORDS), [Scaler()], FixedTarget(contexts=(64, 8192), target=16))
    with pytest.raises(rw.DataError, match=r"2 document\(s\) of 64 tokens needed, it has 1"):
        cells(LocalModel(model), text(WORDS), [Scaler()], Truncate(contexts=(64,), samples=2))
    with pytest.raises(rw.ConfigError, match="target 64 leaves no context within 64 tokens"):
        cells(LocalModel(model), text(WORDS), [Scaler()], FixedTarget(contexts=(64,), target=64))
    with pytest.raises(rw.ConfigError, match="target 63 leaves no context within 64 tokens"):
        FixedTarget(contexts=(64,), target=63).windows([[*range(99)]], 64, Start(prefix=[256, 257], token=None))
    with pytest.raises(rw.ConfigError, match="stride 64 must be between 1 and 63, the tokens of the text in a window"):
        Sliding(contexts=(64,), stride=64).windows([[*range(99)]], 64, Start(prefix=[256], token=256))
    with pytest.raises(rw.ConfigError, match="Did you mean 'sliding'"):
        protocol("slidng", (64,))
    with pytest.raises(rw.ConfigError, match="stride has no effect on fixed-target; leave it out, or use sliding"):
        protocol("fixed-target", (64,), stride=3)
    with pytest.raises(rw.ConfigError, match="strid has no effect on sliding; it takes text_tokens, stride"):
        protocol("sliding", (64,), strid=3)
    with pytest.raises(rw.ConfigError, match="samples 0 must be at least 1"):
        FixedTarget(contexts=(64,), target=16, samples=0)


def test_the_usual_target_leaves_as_much_context():
    for contexts, target in (((8192, 2048), 1024), ((1024, 4096), 512), ((64,), 32), ((2,), 1)):
        assert protocol("fixed-target", contexts).settings["target"] == target
    assert protocol("fixed-target", (1024,), target=1000).settings["target"] == 1000
    assert protocol("harm", (1024,)).settings["target"] is None
    with pytest.raises(rw.ConfigError, match="at least one context"):
        protocol("repeat", ())


def test_cost_counts_the_steps_of_a_cell_once():
    model = tiny_model()
    cost = ForwardCost.of(model)
    cell = cells(LocalModel(model), text(WORDS), [Linear(factor=2)], FixedTarget(contexts=(128,), target=16))[0]
    steps = [cost.step(past, 1) for past in range(127)]
    assert sum(steps) == pytest.approx(cost.passes(cell.pass_lengths), rel=1e-9)
    config = model.hf.config
    embedding = 257 * config.hidden_size
    weights = sum(p.numel() for p in model.hf.parameters()) - embedding
    assert cost.dense == 2 * weights
    assert cost.attention == 4 * 2 * 4 * 8
    assert cost.windowed == 0


def test_cost_counts_the_keys_in_a_window():
    full = ForwardCost.of_config(tiny_model().hf.config)
    windows = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
    gemma = Gemma3TextConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=8, **windows)
    mistral = MistralConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, sliding_window=8)
    for config, windowed in ((gemma, 1), (mistral, 2)):
        cost = ForwardCost.of_config(config)
        assert (cost.dense, cost.window) == (full.dense, 8)
        assert (cost.attention, cost.windowed) == (full.attention * (2 - windowed) / 2, full.attention * windowed / 2)
        pairs = sum(min(past + 0.5, 8) for past in range(100))  # a token half reads itself
        expected = 100 * cost.dense + cost.attention * 100**2 / 2 + cost.windowed * pairs
        assert cost.passes([100]) == pytest.approx(expected, rel=1e-9)
        assert sum(cost.step(past, 5) for past in range(0, 100, 5)) == pytest.approx(expected, rel=1e-9)
