"""Several prompts together: every answer is the one that the prompt gets alone. A shared beginning is read once."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from live import MORE, TEXT, counted, greedy, limit_memory

import ropewalk as rw
from ropewalk.engine import generation, sequence
from ropewalk.engine.kv_cache import KVCache
from ropewalk.engine.runners.runner import CHUNK

pytestmark = pytest.mark.usefixtures("untouched")

MIXED = ["import nump", TEXT * 3, "x", MORE, "", "é", TEXT * 3 + MORE, "白云", TEXT * 3, "import nump", "class A:\n"]


def same(rows, alone):
    assert len(rows) == len(alone)
    for row, expected in zip(rows, alone, strict=True):
        for name in ("text", "token_ids", "finish_reason", "usage"):
            assert getattr(row, name) == getattr(expected, name)
        assert (row.healing is None) == (expected.healing is None)
        for a, b in zip(row.logprobs or [], expected.logprobs or [], strict=True):
            assert a.top == pytest.approx(b.top, abs=1e-4)


@pytest.mark.parametrize(
    "params",
    [
        greedy(10),
        greedy(10, continuation="off", logprobs=2),
        greedy(10, continuation="exact", logprobs=3),
        greedy(12, stop=["a", "\n"]),
        greedy(10, repetition_penalty=1.4),
        greedy(1),
        rw.SamplingParams(max_new_tokens=10, temperature=1, seed=11),
        rw.SamplingParams(max_new_tokens=10, seed=4, top_p=0.8, temperature=1.5, continuation="exact"),
    ],
    ids=lambda params: f"{params.continuation}-{params.seed}-{params.max_new_tokens}-{params.stop}",
)
def test_each_row_is_what_it_is_alone(model, params):
    assert len(MIXED) > generation.ROWS
    same(model.generate(MIXED, params), [model.generate(prompt, params) for prompt in MIXED])


@pytest.mark.parametrize("spec", ["yarn:4", "rerope:16|logn", "ntk:4|dual-chunk:64,window=16", "dynamic-ntk:2"])
def test_rows_under_a_scaler(model, spec):
    model.rope = spec
    same(model.generate(MIXED, greedy(6)), [model.generate(prompt, greedy(6)) for prompt in MIXED])


@pytest.mark.parametrize("spec", [None, "rerope:16", "dynamic-yarn"])
def test_rows_where_transformers_runs_the_model(tiny_folder, spec):
    plain = rw.load(tiny_folder, spec, max_length=4096, compile=False)
    same(plain.generate(MIXED[:4], greedy(6)), [plain.generate(prompt, greedy(6)) for prompt in MIXED[:4]])


def test_no_prompts_and_the_same_prompt_many_times(model):
    assert model.generate([], greedy()) == []
    same(model.generate([TEXT] * 11, greedy(4)), [model.generate(TEXT, greedy(4))] * 11)


def test_rows_that_end_early_make_room_for_the_next(model, monkeypatch):
    alone = [model.generate(prompt, greedy(12)).token_ids for prompt in MIXED]
    ends = {alone[0][2], alone[3][5]}
    monkeypatch.setattr(model.hf.generation_config, "eos_token_id", [*ends])
    monkeypatch.setattr(generation, "ROWS", 3)
    lengths = [next((n + 1 for n, i in enumerate(ids) if i in ends), len(ids)) for ids in alone]
    assert len(set(lengths)) > 2
    widths, step = [], model._runner.step
    monkeypatch.setattr(model._runner, "step", lambda rows: widths.append(len(rows)) or step(rows))
    rows = model.generate(MIXED, greedy(12))
    assert [row.token_ids for row in rows] == [ids[:n] for ids, n in zip(alone, lengths, strict=True)]
    assert sum(widths) == sum(n - 1 for n in lengths)  # the first token comes with the prompt
    assert max(widths) == 3
    remaining = sum(widths)
    for width in widths:  # no slot is empty while a prompt waits
        if width < 3:
            assert remaining <= 12 * 3
        remaining -= width
    assert len(widths) < sum(widths) / 2


SHARED = TEXT * 4


@pytest.mark.parametrize("tokens", [1, 5])
def test_a_shared_beginning_is_read_once(model, monkeypatch, tokens):
    prompts = [SHARED + end for end in ("x = 1\n", "y", "", "import os\n", "(", "# a\n")] * 3
    assert len(prompts) > 2 * generation.ROWS
    alone = [model.generate(prompt, greedy(tokens)) for prompt in prompts]
    with counted(model, monkeypatch) as counts:
        rows = model.generate(prompts, greedy(tokens))
    same(rows, alone)
    once = len(model.vocabulary.encode(SHARED))
    assert once < sum(counts) < once + len(prompts) * (tokens + 24)


def test_a_short_shared_beginning_is_not_worth_a_copy(model, monkeypatch):
    forks = []
    monkeypatch.setattr(KVCache, "fork", lambda cache: forks.append(cache))
    model.generate(["import os\n", "import os\nimport sys\n"], greedy(3))
    assert forks == []


def test_sharing_leaves_the_row_that_was_read_first(model):
    prompts = [SHARED + "x = 1\n", SHARED[:-20] + "y = 2\n", SHARED + "x = 1\n    return", SHARED]
    for params in (greedy(12), rw.SamplingParams(max_new_tokens=12, temperature=1, seed=2)):
        same(model.generate(prompts, params), [model.generate(prompt, params) for prompt in prompts])


@pytest.mark.parametrize("many", [False, True])
def test_max_time_ends_with_time(model, monkeypatch, many):
    now = iter(range(1000))
    monkeypatch.setattr(sequence, "time", SimpleNamespace(monotonic=lambda: next(now)))
    params = greedy(50, max_time=6)
    rows = model.generate([TEXT, MORE], params) if many else [model.generate(TEXT, params)]
    whole = [model.generate(prompt, greedy(50)) for prompt in (TEXT, MORE)]
    for row, expected in zip(rows, whole, strict=False):
        assert row.finish_reason == "time"
        assert 1 <= len(row.token_ids) <= 7
        assert row.token_ids == expected.token_ids[: len(row.token_ids)]
        assert expected.text.startswith(row.text)


@pytest.fixture
def slow_reading(model, monkeypatch):
    """A clock on which every forward pass over a prompt takes ten seconds, and nothing else takes time."""
    clock, forward = [0.0], model._runner.forward

    def slow(*args, **more):
        clock[0] += 10
        return forward(*args, **more)

    monkeypatch.setattr(sequence, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(model._runner, "forward", slow)
    return clock


LONG = TEXT * 80


@pytest.mark.parametrize("prompt", [LONG, [LONG, LONG]], ids=["one", "two"])
def test_max_time_ends_the_reading_of_a_prompt(model, slow_reading, prompt):
    """A prompt of three chunks: the second is read, the third is not."""
    answers = model.generate(prompt, greedy(5, max_time=15))
    for answer in answers if isinstance(prompt, list) else [answers]:
        assert (answer.finish_reason, answer.text, answer.token_ids) == ("time", "", [])
    assert slow_reading[0] == 20


def test_a_session_goes_on_where_max_time_ended_the_reading(model, slow_reading):
    with model.session() as session:
        session.generate(LONG, greedy(5, max_time=15))
        assert session.tokens == 2 * CHUNK
        assert session.generate("", greedy(5)).text == model.generate(LONG, greedy(5)).text


def test_max_time_holds_over_contexts(model, slow_reading):
    answer = model.generate("\nQuestion", greedy(5, max_time=15), contexts=[LONG, TEXT])
    assert (answer.finish_reason, answer.text) == ("time", "")
    assert model.generate("\nQuestion", greedy(5), contexts=[LONG, TEXT]).finish_reason == "length"


def test_processes_that_split_a_model_have_one_clock(model, monkeypatch):
    monkeypatch.setattr(sequence.tensor_parallel, "broadcast_from_rank0", lambda late: True)
    assert model.generate(TEXT, greedy(5, max_time=1e6)).finish_reason == "time"


def test_one_prompt_that_is_too_long_refuses_all_before_any_work(model, monkeypatch):
    with counted(model, monkeypatch) as counts, pytest.raises(rw.ContextOverflow, match="more than the 4k that"):
        model.generate([TEXT, "x" * 20000], greedy())
    assert counts == []


@pytest.mark.parametrize(("rows", "expected"), [(8, 5), (2.5, 2), (1.2, 1)])
def test_no_more_rows_than_memory_holds(model, monkeypatch, rows, expected):
    prompts = [f"x = {n}\n" for n in range(5)]
    tokens = len(model.vocabulary.encode(prompts[0])) + 4
    alone = [model.generate(prompt, greedy(4)) for prompt in prompts]
    free = limit_memory(monkeypatch, model, int(rows * tokens * model.bytes_per_token))
    widths, step = [], model._runner.step
    monkeypatch.setattr(model._runner, "step", lambda rows: widths.append(len(rows)) or step(rows))
    same(model.generate(prompts, greedy(4)), alone)
    assert max(widths) == expected
    assert min(free) >= 0


def test_an_interrupted_batch_leaves_nothing_behind(model, monkeypatch):
    expected = model.generate(MIXED, greedy(4))
    step, calls = model._runner.step, []

    def stops(rows):
        calls.append(rows)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return step(rows)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(model._runner, "step", stops)
        model.generate(MIXED, greedy(4))
    same(model.generate(MIXED, greedy(4)), expected)
    assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("compile", [False, "auto"])
def test_rows_of_a_model_whose_own_scaling_follows_the_length(tiny_folder, tmp_path, compile):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] |= {"rope_type": "dynamic", "factor": 4.0}
    (folder / "config.json").write_text(json.dumps(config))
    model = rw.load(folder, max_length=1024, compile=compile)
    prompts = [TEXT, TEXT * 12]
    same(model.generate(prompts, greedy(10)), [model.generate(prompt, greedy(10)) for prompt in prompts])
    short, long = (model.generate(prompt, greedy(1)).usage.prompt_tokens for prompt in prompts)
    assert short < 200 < 256 < long


def test_nothing_is_written_together_with_what_needs_other_frequencies(model, monkeypatch):
    model.rope = "dynamic-ntk"
    sizes, step = [], model._runner.step
    monkeypatch.setattr(model._runner, "step", lambda rows: sizes.append(len(rows)) or step(rows))
    model.generate([TEXT, TEXT * 3], greedy(4))
    assert set(sizes) == {1}


def test_a_session_beyond_the_trained_length_writes_under_the_frequencies_of_its_length(tiny_folder):
    grown = rw.load(tiny_folder, rope="dynamic-ntk", compile=False, max_length=4096)
    session = grown.session()
    session.append((TEXT + MORE) * 6)
    assert session.tokens > grown.trained_length
    expected = grown.generate((TEXT + MORE) * 6 + "\ndef ", greedy(6))
    assert session.generate("\ndef ", greedy(6)).token_ids == expected.token_ids
