"""The protocols that follow other programs and papers, against independent lines written from their definitions."""

import math

import numpy as np
import pytest
import torch
from byte_model import WORDS, llama_cpp_nats, losses, measure, run_plan, text, tiny_model
from copier import VOCABULARY, copier

import ropewalk as rw
from ropewalk.engine.patches import scaler_slot
from ropewalk.evals.models.local import LocalModel
from ropewalk.evals.protocols import longppl
from ropewalk.evals.protocols.fixed_target import Repeat
from ropewalk.evals.protocols.harm import Harm, compare_distributions
from ropewalk.evals.protocols.longppl import JudgeCell, LongPPL, key_tokens
from ropewalk.evals.protocols.perplexity_cell import cells
from ropewalk.evals.protocols.protocol import Window
from ropewalk.evals.protocols.whole_text import Disjoint, LlamaCpp, Sliding
from ropewalk.evals.runs.result import Run
from ropewalk.scaling import Scaler, parse


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def bos_model():
    return tiny_model(bos=True)


def body(model, document=WORDS):
    return list(model.tokenizer(document, add_special_tokens=False).input_ids)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("context", [64, 51])
def test_llamacpp_is_its_sum(tmp_path, model, bos_model, bos, context):
    used = bos_model if bos else model
    plan = LlamaCpp(contexts=(context,), text_tokens=230)
    (row,) = run_plan(tmp_path, used, plan, WORDS[:100], WORDS[100:]).rows
    tokens = [*([256] if bos else []), *body(used)][:230]

    def logits_of(ids):
        with torch.inference_mode():
            return used.hf(torch.tensor([ids])).logits[0]

    total, count = llama_cpp_nats(logits_of, tokens, context, 256 if bos else None)
    assert row["tokens"] == count == (230 // context) * (context - context // 2 - 1)
    assert row["loss"] == pytest.approx(total / count, abs=1e-5)


def test_llamacpp_needs_two_chunks(model):
    with pytest.raises(rw.DataError, match=r"two chunks: 128 tokens of text for a context of 64, but it has 100;"):
        cells(LocalModel(model), text(WORDS), [Scaler()], LlamaCpp(contexts=(64,), text_tokens=100))


def disjoint_losses(model, ids, start, context):
    """Windows laid as lm-evaluation-harness lays them: input and scored tokens."""
    head = ids[:context]
    pairs = [([start, *head[:-1]], head)]
    for at in range(context, len(ids), context):
        end = min(at + context, len(ids))
        pairs.append((ids[end - context - 1 : end - 1], ids[at:end]))
    return np.concatenate([losses(model, [*before, after[-1]])[-len(after) :] for before, after in pairs])


@pytest.mark.parametrize("length", [40, 64, 192, 230])
def test_disjoint_scores_every_token_once(tmp_path, model, length):
    plan = Disjoint(contexts=(64,), text_tokens=length)
    run = run_plan(tmp_path, model, plan, WORDS)
    expected = disjoint_losses(model, body(model)[:length], 256, 64)
    assert len(expected) == length
    assert np.allclose(run.losses(run.rows[0]), expected, atol=1e-4)


def test_disjoint_goes_document_by_document(tmp_path, model):
    plan = Disjoint(contexts=(64,), text_tokens=200)
    run = run_plan(tmp_path, model, plan, WORDS[:90], WORDS[90:])
    ids = body(model)
    parts = [disjoint_losses(model, part, 256, 64) for part in (ids[:90], ids[90:200])]
    assert np.allclose(run.losses(run.rows[0]), np.concatenate(parts), atol=1e-4)


def test_disjoint_at_the_trained_length_is_the_untouched_model_under_auto(tmp_path):
    """Its windows feed L tokens and score as many; L + 1 ids took Self-Extend."""
    model = tiny_model()
    plan = Disjoint(contexts=(model.trained_length,), text_tokens=3 * model.trained_length)
    runs = [run_plan(tmp_path / spec, model, plan, WORDS, scaler=spec) for spec in ("none", "auto")]
    assert [run.rows[0].get("chosen") for run in runs] == [None, "none"]
    assert np.array_equal(*(run.losses(run.rows[0]) for run in runs))


@pytest.mark.parametrize("length", [192, 230])
def test_a_stride_of_the_window_is_disjoint(model, length):
    """One window of the harness feeds as many tokens as it scores: its ids are one more."""
    documents = [[256, *body(model)[:length]]]
    settings = {"text_tokens": 1000}
    (slid,) = rw.evals.perplexity(model, documents, protocol="sliding", lengths=[65], stride=64, **settings)
    (whole,) = rw.evals.perplexity(model, [documents[0][1:]], protocol="disjoint", lengths=[64], **settings)
    assert slid.tokens == whole.tokens == length
    np.testing.assert_allclose(slid.losses, whole.losses, atol=1e-5)


def documented_by_transformers(hf, ids, max_length, stride, *, exact_weights):
    """Its page on the perplexity of fixed-length models; the model's own loss is a mean over each window.

    There a window counts one token less than it scores, as if its first were lost to the shift; that is so in the
    first window only. With `exact_weights` every scored token counts once.
    """
    total, count, scored_to = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + max_length, len(ids))
        inputs = torch.tensor([ids[begin:end]])
        labels = inputs.clone()
        labels[:, : -(end - scored_to)] = -100
        with torch.inference_mode():
            mean = float(hf(inputs, labels=labels).loss)
        valid = int((labels != -100).sum())
        weight = valid - 1 if begin == 0 or not exact_weights else valid
        total, count, scored_to = total + mean * weight, count + weight, end
        if end == len(ids):
            break
    return total / count


def test_sliding_is_what_transformers_documents(tmp_path, model):
    length = 64 + 10 * 32  # where the last window is whole; a shorter one has less context there than here
    plan = Sliding(contexts=(64,), stride=32, text_tokens=length)
    (row,) = run_plan(tmp_path, model, plan, WORDS).rows
    ids = body(model)[:length]
    exact = documented_by_transformers(model.hf, ids, 64, 32, exact_weights=True)
    assert row["loss"] == pytest.approx(exact, abs=1e-5)
    assert row["loss"] != pytest.approx(
        documented_by_transformers(model.hf, ids, 64, 32, exact_weights=False), abs=1e-4
    )


@pytest.mark.parametrize("bos", [False, True])
def test_repeat_puts_the_scored_passage_in_front(tmp_path, model, bos_model, bos):
    used = bos_model if bos else model
    plan = Repeat(contexts=(64, 128), target=24, samples=2)
    run = run_plan(tmp_path, used, plan, WORDS, scaler="yarn:2")
    ids, start = body(used), [256] if bos else []
    for row in run.rows:
        fresh, again = [], []
        for end in (len(ids) // 2, len(ids)):
            passage, gap = ids[end - 24 : end], row["context"] - len(start) - 48
            other = ids[end - 48 - gap : end - 24 - gap]
            between = ids[end - 24 - gap : end - 24]
            for front, found in ((other, fresh), (passage, again)):
                window = [*start, *front, *between, *passage]
                assert len(window) == row["context"]
                found.append(under(used, "yarn:2", window)[-24:])
        fresh, again = np.concatenate(fresh), np.concatenate(again)
        assert np.allclose(run.losses(row), again, atol=1e-4)
        assert row["fresh_loss"] == pytest.approx(fresh.mean(), abs=1e-4)
        assert row["gain"] == pytest.approx((fresh - again).mean(), abs=1e-4)


def under(model, scaler, ids):
    model.rope = None
    with rw.patch(model.hf, scaler):
        return losses(model, ids)


def distinct_tokens(count):
    return np.random.default_rng(0).permutation(VOCABULARY)[:count].tolist()


def test_a_model_that_copies_gains_all_there_is_from_a_repetition():
    rows = rw.evals.perplexity(copier, [distinct_tokens(600)], protocol="repeat", lengths=[320, 512], target=128)
    for row in rows:
        assert row.losses[0] == pytest.approx(math.log(VOCABULARY), abs=1e-4)  # nothing says that A begins
        assert row.losses[1:].max() < 1e-6
        assert row.fresh_loss == pytest.approx(math.log(VOCABULARY), abs=1e-5)
        assert row.gain == pytest.approx(math.log(VOCABULARY) * 127 / 128, abs=1e-4)
        assert row.gain_low <= row.gain <= row.gain_high
        assert row.bits_per_byte is None


def far_document():
    """512 tokens; those at 472..503 repeat 20..51, so that they need 452 tokens of context; then 8 new ones."""
    ids = distinct_tokens(512)
    return [*ids[:472], *ids[20:52], *ids[504:]]


def test_longppl_scores_the_tokens_that_need_far_context():
    given = {"protocol": "longppl", "target": 64, "trained_length": 128}
    near, far = rw.evals.perplexity(copier, [far_document()], lengths=[128, 512], **given)
    assert (near.tokens, far.tokens, far.candidates) == (31, 31, 64)
    assert far.loss == pytest.approx(0, abs=1e-5)
    assert near.loss == pytest.approx(math.log(VOCABULARY), abs=1e-4)
    assert far.judge == "none at 512"
    with pytest.raises(rw.DataError, match=r"judge none finds 0 key tokens among 8 \(512 of context against 128\)"):
        rw.evals.perplexity(copier, [far_document()], lengths=[512], **(given | {"target": 8}))
    with pytest.raises(rw.ConfigError, match="longest context, 128, with the trained length, 128; give a longer"):
        rw.evals.perplexity(copier, [far_document()], lengths=[128], **given)


def test_key_tokens_are_those_of_the_paper():
    short, full = np.array([5.0, 5.0, 3.5, 1.9, 4.1]), np.array([2.5, 1.9, 1.4, 0.0, 2.0])
    assert key_tokens(short, full).tolist() == [False, True, True, False, False]


def test_every_scaler_and_context_is_scored_on_the_judges_keys_and_the_judge_is_asked_once(
    tmp_path, monkeypatch, model
):
    monkeypatch.setattr(longppl, "GAIN", 0.05)
    monkeypatch.setattr(longppl, "MOST_LOSS", 99.0)
    plan = LongPPL(contexts=(64, 128), target=48, samples=2, judge="yarn: 2.0")
    planned = cells(LocalModel(model), text(WORDS), [parse("none"), parse("linear:2")], plan)
    assert isinstance(planned[0], JudgeCell)
    assert planned[0].pass_lengths == [63, 63, 127, 127]
    run = Run(tmp_path)
    for cell in planned:
        measure(model, cell, run)
    ids = body(model)
    ends = (len(ids) // 2, len(ids))
    judged = [
        np.concatenate([under(model, "yarn:2", ids[end - context : end])[-48:] for end in ends])
        for context in (64, 128)
    ]
    keys = judged[0] - judged[1] > 0.05
    assert 16 <= keys.sum() < 80
    rows = [row for row in run.rows if row["task"] == "ppl"]
    assert len(rows) == 4
    for row in rows:
        windows = (under(model, row["rope"], ids[end - row["context"] : end])[-48:] for end in ends)
        assert np.allclose(run.losses(row), np.concatenate(list(windows))[keys], atol=1e-4)
        assert (row["tokens"], row["candidates"]) == (keys.sum(), 96)
        assert row["bits_per_byte"] == pytest.approx(row["loss"] / math.log(2), abs=1e-4)  # a token is a byte
    later = Run(tmp_path)
    assert planned[0].is_done(later)
    assert (planned[0].keys(later) == keys).all()


def test_harm_of_the_untouched_model_is_nothing(tmp_path, model):
    run = run_plan(tmp_path, model, Harm(contexts=(32, 64), samples=2), WORDS)
    for row in run.rows:
        assert row["tokens"] == 2 * (row["context"] - 1)
        assert (row["kl"], row["difference"], row["same_top1"]) == (0.0, 0.0, 100.0)
        assert row["loss"] == row["base_loss"]


@pytest.mark.parametrize("scaler", ["linear:2", "rerope:16|logn", "dynamic-ntk:2"])
def test_harm_against_all_logits_at_once(tmp_path, scaler):
    model = tiny_model()
    run = run_plan(tmp_path, model, Harm(contexts=(64,), target=40), WORDS, scaler=scaler)
    (row,) = run.rows
    ids = torch.tensor([body(model)[-64:]])
    model.rope = None
    with torch.inference_mode():
        base = model.hf(ids).logits[0, 23:-1].double().log_softmax(-1)
        with rw.patch(model.hf, scaler, length=64):
            scaled = model.hf(ids).logits[0, 23:-1].double().log_softmax(-1)
    kl = torch.nn.functional.kl_div(scaled, base, log_target=True, reduction="none").sum(-1)
    targets = ids[0, 24:, None]
    difference = base.gather(-1, targets) - scaled.gather(-1, targets)
    assert row["kl"] == pytest.approx(float(kl.mean()), abs=1e-5)
    assert (row["kl"] > 0.01) == (scaler != "dynamic-ntk:2")
    assert row["difference"] == pytest.approx(float(difference.mean()), abs=1e-5)
    assert row["same_top1"] == pytest.approx(100 * float((base.argmax(-1) == scaled.argmax(-1)).double().mean()))
    assert row["tokens"] == 40


def test_harm_checks_a_scaler_once_however_often_it_changes_between_the_two(tmp_path, monkeypatch):
    model, checked, install = tiny_model(), [], scaler_slot.install
    monkeypatch.setattr(scaler_slot, "install", lambda *args, **more: checked.append(args[2]) or install(*args, **more))
    run_plan(tmp_path, model, Harm(contexts=(40,), samples=4), WORDS, scaler="rerope:16|logn")
    assert 0 < len(checked) <= 4


def test_harm_does_not_depend_on_how_much_is_held_at_once(monkeypatch):
    model = tiny_model()
    window = Window(ids=body(model)[:64], first=10, place="0:64")
    readers = LocalModel(model), LocalModel(model, parse("linear:2"))
    whole = compare_distributions(*readers, window, lambda past, count: None)
    monkeypatch.setattr("ropewalk.engine.prefill.LOGITS_BUDGET", 257 * 5)
    monkeypatch.setattr("ropewalk.evals.protocols.harm._ROWS", 3)
    monkeypatch.setattr("ropewalk.engine.runners.runner.CHUNK", 7)
    steps = []
    parts = compare_distributions(*readers, window, lambda past, count: steps.append((past, count)))
    for one, other in zip(whole, parts, strict=True):
        assert np.allclose(one, other, atol=2e-5)
        assert len(one) == 54
    assert sum(count for _, count in steps) == 2 * 63
    assert max(count for _, count in steps) == 7
    assert steps[0] == (0, 7)


def test_harm_is_for_lengths_that_the_model_reads(model):
    with pytest.raises(rw.ConfigError, match="trained length is 64; the context 128 is beyond it: give shorter ones"):
        cells(LocalModel(model), text(WORDS), [Scaler()], Harm(contexts=(32, 128)))
    with pytest.raises(rw.ConfigError, match="target 40 does not fit twice into 64 tokens"):
        cells(LocalModel(model), text(WORDS), [Scaler()], Repeat(contexts=(64,), target=40))
