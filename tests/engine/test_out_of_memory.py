"""Memory that runs out in the middle of a text: smaller chunks are tried, then an error, and nothing read is lost."""

import pytest
import torch

import ropewalk as rw
from ropewalk.engine.cache import tokens_read
from ropewalk.engine.runners.runner import CHUNK

pytestmark = pytest.mark.usefixtures("untouched")

TEXT = "import os\n\n\ndef walk(top):\n    return [name for name in os.listdir(top)]\n\n\n" * 30
ERRORS = {
    "numpy": MemoryError("cannot allocate"),
    "torch on the CPU": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    "torch on a GPU": torch.OutOfMemoryError("CUDA out of memory"),
}


def limit(monkeypatch, model, most, error=ERRORS["numpy"]):
    """No step of more than `most` tokens fits; what is too long fails when its first layer has written the cache."""
    forward, sizes = model._runner.forward, []

    def limited(ids, cache, logits_to_keep):
        sizes.append(len(ids))
        if len(ids) > most:
            layer = cache.layers[0]
            if layer.get_seq_length():
                layer.update(layer.keys[:, :, :5].clone(), layer.values[:, :, :5].clone())
            raise error
        return forward(ids, cache, logits_to_keep=logits_to_keep)

    monkeypatch.setattr(model._runner, "forward", limited)
    return sizes


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_smaller_chunks_are_tried(model, monkeypatch, error):
    expected = model.score(TEXT)
    sizes = limit(monkeypatch, model, 200, error)
    score = model.score(TEXT)
    assert max(sizes) > 200 >= sizes[-1]
    assert torch.allclose(score.logprobs, expected.logprobs, atol=1e-4)


def test_when_nothing_fits_it_is_said_and_the_model_goes_on(model, monkeypatch):
    params = rw.SamplingParams(max_new_tokens=4, temperature=0)
    expected = model.generate(TEXT, params)
    with monkeypatch.context() as tight:
        limit(tight, model, 10)
        with pytest.raises(rw.ContextOverflow, match=r"out of memory after 0 tokens; shorten the text"):
            model.generate(TEXT, params)
    assert model.generate(TEXT, params) == expected


def test_a_session_keeps_what_it_had_read(model, monkeypatch):
    with model.session() as session:
        session.append(TEXT[:700])
        read = session.tokens
        with monkeypatch.context() as tight:
            limit(tight, model, 10)
            with pytest.raises(rw.ContextOverflow, match=f"out of memory after {read} tokens"):
                session.append(TEXT[700:])
        assert (session.text, session.tokens) == (TEXT[:700], read)
        session.append(TEXT[700:])
        params = rw.SamplingParams(max_new_tokens=4, temperature=0)
        assert session.generate("", params).token_ids == model.generate(TEXT, params).token_ids


def test_a_cache_of_ones_own_keeps_whole_chunks_and_goes_on_from_them(model, monkeypatch):
    ids, params = model.vocabulary.encode(TEXT * 2), rw.SamplingParams(max_new_tokens=4, temperature=0)
    expected, cache = model.generate_ids(ids, params), model.new_cache(len(ids))
    assert len(ids) > CHUNK
    forward = model._runner.forward

    def limited(ids, cache, logits_to_keep):
        if len(ids) < CHUNK:  # the last chunk, and its halves
            raise MemoryError("cannot allocate")
        return forward(ids, cache, logits_to_keep=logits_to_keep)

    with monkeypatch.context() as tight, pytest.raises(rw.OutOfMemory, match="after 1024 tokens"):
        tight.setattr(model._runner, "forward", limited)
        model.generate_ids(ids, params, cache)
    assert tokens_read(cache) == CHUNK
    assert model.generate_ids(ids, params, cache) == expected


def test_other_errors_are_not_taken_for_it(model, monkeypatch):
    limit(monkeypatch, model, 10, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        model.score(TEXT)


BATCH = ["import os\n", TEXT[:300], "def f(x):\n", TEXT[:200], "class A:\n    "]


def tokens(completions):
    return [completion.token_ids for completion in completions]


def answer_alone(model, params):
    return tokens([model.generate(prompt, params) for prompt in BATCH])


def most_rows(monkeypatch, model, most):
    """No step of more than `most` rows fits; it fails when its first cache has been written."""
    step, sizes = model._runner.step, []

    def limited(rows):
        sizes.append(len(rows))
        if len(rows) > most:
            layer = rows[0][1].layers[0]
            layer.update(layer.keys[:, :, :1].clone(), layer.values[:, :, :1].clone())
            raise MemoryError("cannot allocate")
        return step(rows)

    monkeypatch.setattr(model._runner, "step", limited)
    return sizes


def test_fewer_texts_are_written_together_where_memory_runs_out(model, monkeypatch):
    params = rw.SamplingParams(max_new_tokens=6, temperature=1, seed=3)
    expected = answer_alone(model, params)
    sizes = most_rows(monkeypatch, model, 2)
    assert tokens(model.generate(BATCH, params)) == expected
    assert sizes[:3] == [5, 4, 3]
    assert max(sizes[3:]) == 2


def test_fewer_texts_are_begun_together_where_memory_runs_out(model, monkeypatch):
    params = rw.SamplingParams(max_new_tokens=6, temperature=1, seed=3)
    expected = answer_alone(model, params)
    forward, failures = model._runner.forward, []

    def limited(ids, cache, logits_to_keep):
        if not failures and len(ids) > 30:  # a long prompt, while a short one is in progress
            failures.append(len(ids))
            raise MemoryError("cannot allocate")
        return forward(ids, cache, logits_to_keep=logits_to_keep)

    monkeypatch.setattr(model._runner, "forward", limited)
    assert tokens(model.generate(BATCH, params)) == expected
    assert len(failures) == 1


def test_more_texts_are_written_together_again_after_a_lack_of_memory_that_passed(model, monkeypatch):
    params = rw.SamplingParams(max_new_tokens=6, temperature=1, seed=3)
    prompts = [f"{BATCH[n % 5]}{n}\n" for n in range(30)]
    expected = [model.generate(prompt, params).token_ids for prompt in prompts]
    step, sizes = model._runner.step, []

    def limited(rows):
        sizes.append(len(rows))
        if len(sizes) == 1:
            raise MemoryError("cannot allocate")
        return step(rows)

    monkeypatch.setattr(model._runner, "step", limited)
    assert tokens(model.generate(prompts, params)) == expected
    assert sizes[:2] == [8, 7]
    assert max(sizes[2:]) == 8


def test_few_prompts_are_read_in_vain_where_memory_is_short_for_long(model, monkeypatch):
    params = rw.SamplingParams(max_new_tokens=6, temperature=0)
    prompts = [f"x = {n}\n" for n in range(40)]
    expected = [model.generate(prompt, params).token_ids for prompt in prompts]
    sizes = most_rows(monkeypatch, model, 2)
    assert tokens(model.generate(prompts, params)) == expected
    trials = sum(size > 2 for size in sizes[6:]) / 2  # one more step each, after the cache of an ended text was freed
    assert 1 <= trials <= 40 / 8


def test_answers_that_were_finished_come_with_the_error(model, monkeypatch):
    params = rw.SamplingParams(max_new_tokens=6, temperature=0)
    expected = answer_alone(model, params)
    with monkeypatch.context() as tight:
        limit(tight, model, 20)
        with pytest.raises(rw.OutOfMemory, match="out of memory after") as raised:
            model.generate(BATCH, params)
    assert list(raised.value.finished) == [0]
    assert tokens(raised.value.finished.values()) == expected[:1]
    assert tokens(model.generate(BATCH, params)) == expected


@pytest.mark.parametrize(("fails", "done"), [(lambda *at: limit(*at, 20), [0]), (lambda *at: most_rows(*at, 2), [])])
def test_a_cache_that_cannot_go_back_loses_no_answer_that_was_done(model, monkeypatch, fails, done):
    """So it is with the caches of some windowed families, whose layers have dropped what stood before."""
    params = rw.SamplingParams(max_new_tokens=6, temperature=0)
    expected = answer_alone(model, params)
    with monkeypatch.context() as tight:
        tight.setattr("ropewalk.engine.cache.layers_agree", lambda *_: False)
        fails(tight, model)
        with pytest.raises(rw.OutOfMemory, match="out of memory after") as raised:
            model.generate(BATCH, params)
    assert {n: answer.token_ids for n, answer in raised.value.finished.items()} == {n: expected[n] for n in done}
    assert tokens(model.generate(BATCH, params)) == expected


def test_a_step_that_does_not_fit_is_told(model, monkeypatch):
    def fail(*_, **__):
        raise MemoryError("cannot allocate")

    stream = model.stream("import os\n", rw.SamplingParams(max_new_tokens=6, temperature=0))
    next(stream)
    with monkeypatch.context() as tight:
        tight.setattr(model._runner, "step", fail)
        with pytest.raises(rw.OutOfMemory, match=r"out of memory after \d+ tokens"):
            list(stream)


def test_answers_over_contexts_come_with_the_error_too(model, monkeypatch):
    params = rw.SamplingParams(max_new_tokens=3, temperature=0)
    ask = {"contexts": ["import os", "def f(x)"]}
    expected = model.generate("\nWhat is it?", params, **ask)
    with monkeypatch.context() as tight:
        limit(tight, model, 30)
        with pytest.raises(rw.OutOfMemory) as raised:
            model.generate(["\nWhat is it?", "\n" + TEXT], params, **ask)
    assert {n: answer.token_ids for n, answer in raised.value.finished.items()} == {0: expected.token_ids}
