"""The model object on the tiny trained model, against plain transformers."""

import numpy as np
import pytest
import torch
from live import greedy
from transformers import AutoModelForCausalLM

import ropewalk as rw
from ropewalk.engine.generation import complete_all

pytestmark = pytest.mark.usefixtures("untouched")

GREEDY = rw.SamplingParams(max_new_tokens=12, temperature=0)
TEXT = "def main(argv=None):\n    parser = argparse.ArgumentParser()\n    for name in sorted(names):\n" * 4


@pytest.fixture(scope="module")
def model(tiny_folder):
    return rw.load(tiny_folder)


@pytest.fixture(scope="module")
def reference(tiny_folder):
    return AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()


@torch.inference_mode()
def reference_logprobs(reference, ids):
    logprobs = reference(torch.tensor([ids]), use_cache=False).logits[0, :-1].log_softmax(-1)
    return logprobs.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]


@pytest.mark.parametrize(
    "spec",
    [
        "none",
        "yarn:4",
        "ntk:8|resonance",
        "ntk:4|rerope:64|logn",
        "self-extend:8,window=64",
        "jet-long:64|logn",
        "logn",
    ],
)
def test_score_equals_transformers(model, reference, spec):
    model.rope = spec
    score = model.score(TEXT)
    with rw.patch(reference, spec, length=len(score.token_ids)):
        expected = reference_logprobs(reference, score.token_ids)
    assert torch.allclose(score.logprobs, expected, atol=1e-4)
    assert score.loss == pytest.approx(-expected.mean().item(), abs=1e-5)
    assert score.perplexity == pytest.approx(torch.exp(-expected.mean()).item(), rel=1e-4)
    assert score.bits_per_byte == pytest.approx(-expected.sum().item() / 0.693147181 / len(TEXT), rel=1e-4)


def test_greedy_generation_equals_transformers(model, reference):
    completion = model.generate(TEXT, rw.SamplingParams(max_new_tokens=40, temperature=0, continuation="off"))
    ids = torch.tensor([model.tokenizer(TEXT).input_ids])
    expected = reference.generate(ids, max_new_tokens=40, do_sample=False)[0, ids.shape[1] :].tolist()
    assert completion.token_ids == expected
    assert completion.usage.prompt_tokens == ids.shape[1]
    assert completion.usage.completion_tokens == 40
    assert completion.finish_reason == "length"
    assert completion.text == model.tokenizer.decode(ids[0].tolist() + expected)[len(TEXT) :]


def test_repetition_penalty_equals_transformers(model, reference):
    params = rw.SamplingParams(max_new_tokens=30, temperature=0, repetition_penalty=1.3, continuation="off")
    ids = torch.tensor([model.tokenizer(TEXT).input_ids])
    expected = reference.generate(ids, max_new_tokens=30, do_sample=False, repetition_penalty=1.3)
    assert model.generate(TEXT, params).token_ids == expected[0, ids.shape[1] :].tolist()


def test_stream_pieces_join_to_the_text_of_generate(model):
    params = rw.SamplingParams(max_new_tokens=40, temperature=1, seed=5)
    assert "".join(model.stream("import ", params)) == model.generate("import ", params).text


def test_a_list_in_is_a_list_out_and_each_row_is_the_same_alone(model):
    prompts = ["import os\n", "class Error(Exception):\n    def", "x"]
    alone = [model.generate(prompt, GREEDY).token_ids for prompt in prompts]
    assert [c.token_ids for c in model.generate(prompts, GREEDY)] == alone
    assert model.generate([], GREEDY) == []


def test_logprobs_are_those_of_the_chosen_tokens(model):
    params = rw.SamplingParams(max_new_tokens=6, temperature=0, logprobs=2, continuation="off")
    completion = model.generate(TEXT, params)
    prompt = model.tokenizer(TEXT).input_ids
    expected = model.score_ids(prompt + completion.token_ids, first=len(prompt))
    assert torch.allclose(torch.tensor([t.logprob for t in completion.logprobs]), expected, atol=1e-4)
    for token in completion.logprobs:
        assert len(token.top) == 2
        assert max(token.top, key=token.top.get) == token.id
    assert model.generate(TEXT, GREEDY).logprobs is None


def test_seeds_reproduce_and_differ(model):
    def draw(seed):
        return model.generate("def ", rw.SamplingParams(max_new_tokens=20, temperature=1, seed=seed)).token_ids

    assert draw(1) == draw(1)
    assert len({tuple(draw(seed)) for seed in range(4)}) > 1


def test_a_stop_string_ends_the_text_before_it(model):
    whole = model.generate(TEXT, rw.SamplingParams(max_new_tokens=40, temperature=0)).text
    stop = whole[5:8]
    completion = model.generate(TEXT, rw.SamplingParams(max_new_tokens=40, temperature=0, stop=stop))
    assert completion.text == whole[: whole.index(stop)]
    assert completion.finish_reason == "stop"


def test_an_end_token_ends_the_text(model, monkeypatch):
    ids = model.generate(TEXT, GREEDY).token_ids
    monkeypatch.setattr(model.hf.generation_config, "eos_token_id", [ids[3]])
    completion = model.generate(TEXT, GREEDY)
    assert completion.token_ids == ids[: ids.index(ids[3]) + 1]
    assert completion.finish_reason == "stop"


def test_an_empty_prompt_starts_from_the_start_token(model):
    assert model.generate("", GREEDY).usage.prompt_tokens == 1


@pytest.mark.parametrize("rope", ["none", "yarn:2", "self-extend:2,window=128"])
def test_more_tokens_than_the_reach_are_refused_with_the_next_step(model, rope):
    model.rope = rope
    with pytest.raises(rw.ContextOverflow, match=r"more than the .* reaches with rope") as refused:
        model.generate("x", rw.SamplingParams(max_new_tokens=600))
    assert "set model.rope = 'auto'" in str(refused.value)
    model.rope = "auto"
    assert model.generate("x", rw.SamplingParams(max_new_tokens=600)).usage.completion_tokens <= 600


def test_a_limit_that_was_set_is_named_and_no_scaler_is_advised_that_would_not_help(tiny_folder):
    longer = rw.load(tiny_folder, max_length=400)
    assert longer.generate("x", rw.SamplingParams(max_new_tokens=300)).usage.completion_tokens <= 300
    params = rw.SamplingParams(max_new_tokens=600)
    with pytest.raises(rw.ContextOverflow, match=r"loaded for.*raise max_length to \d+ and set model\.rope = 'auto'$"):
        longer.generate("x", params)
    longer.rope = "auto"
    with pytest.raises(rw.ContextOverflow, match=r"was loaded for.*raise max_length to \d+$"):
        longer.generate("x", params)


@pytest.mark.parametrize("spec", ["ntk:4|rerope:64|logn", "dual-chunk|logn", "jet-long:64", "logn"])
def test_maps_write_what_a_patched_transformers_model_writes(model, reference, spec):
    model.rope = spec
    completion = model.generate(
        TEXT, rw.SamplingParams(max_new_tokens=40, temperature=0, logprobs=1, continuation="off")
    )
    ids = torch.tensor([model.tokenizer(TEXT).input_ids])
    with rw.patch(reference, spec, length=ids.shape[1] + 40):
        out = reference.generate(
            ids, max_new_tokens=40, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
    assert completion.token_ids == out.sequences[0, ids.shape[1] :].tolist()
    expected = torch.cat(out.logits).log_softmax(-1).max(-1).values
    assert torch.allclose(torch.tensor([token.logprob for token in completion.logprobs]), expected, atol=1e-4)


def test_a_map_reaches_what_it_says(model):
    model.rope = "self-extend:2,window=128"
    assert model.max_length == 384
    with pytest.raises(rw.ContextOverflow, match="more than the 384 that"):
        model.generate(TEXT, rw.SamplingParams(max_new_tokens=384))
    model.rope = "rerope:64"
    assert model.generate(TEXT * 4, GREEDY).usage.prompt_tokens > 512


def test_scoring_needs_two_tokens(model):
    with pytest.raises(rw.DataError, match="at least 2"):
        model.score("")


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        (("And", "God"), rw.ConfigError, "several go into a list"),
        ([[1.5]], rw.ConfigError, "a prompt is text"),
        ([5], rw.ConfigError, r"not 5; several go into a list, and so does one of token ids: \[\[1, 2, 3\]\]"),
        ([[5, 10**6]], rw.DataError, "token id 1000000"),
        ([[-1]], rw.DataError, "token id -1"),
        (None, rw.ConfigError, "not None"),
    ],
)
def test_what_is_no_prompt_is_refused(model, wrong, error, words):
    with pytest.raises(error, match=words):
        model.generate(wrong, greedy(1))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda model: model.generate("a", 20), "20 is no rw.SamplingParams; give settings by their names"),
        (lambda model: model.stream("a", {"top_k": 2}), "'top_k': 2} is no rw.SamplingParams"),
        (lambda model: model.session().generate("a", 20), "20 is no rw.SamplingParams"),
        (lambda model: model.chat("Hello"), r"messages must be a list such as \[.*, not \'Hello\'"),
        (lambda model: model.chat(None), r"messages must be a list such as \[.*, not None"),
        (lambda model: model.chat(iter([{"role": "user", "content": "a"}])), "messages must be a list"),
        (lambda model: rw.windows("a b", model, tokens=8), "such as model.tokenizer, not <Model"),
        (lambda model: rw.tune("tiny"), "a model that ropewalk.load gave, not 'tiny'"),
        (lambda model: rw.patch(model, "yarn:2"), "not <Model .*; set its rope$"),
        (lambda model: rw.load(None), "transformers model, not None"),
        (lambda model: rw.load(["tiny"]), "transformers model, not .'tiny'"),
        (lambda model: rw.SamplingParams(continuation="exat"), "unknown continuation 'exat'. Did you mean 'exact'"),
    ],
)
def test_an_argument_of_another_kind_is_refused(model, call, words):
    with pytest.raises(rw.ConfigError, match=words):
        call(model)


def test_bytes_of_any_kind_are_text(model):
    for prompt in (b"import os", bytearray(b"import os"), memoryview(b"import os")):
        assert model.generate(prompt, greedy(4)) == model.generate("import os", greedy(4))


@pytest.mark.parametrize(
    ("ids", "first", "words"),
    [
        ([], 1, "of 0 token ids"),
        ([5], 1, "of 1"),
        ([5, 6], 0, "first 0"),
        ([5, 6], 2, "first 2"),
        ([5, 9999], 1, "9999"),
    ],
)
def test_ids_that_cannot_be_scored_are_refused(model, ids, first, words):
    with pytest.raises(rw.DataError, match=words):
        model.score_ids(ids, first)


def test_a_cache_that_holds_tokens_is_refused_for_scoring(model):
    """The text was scored after them, without a word."""
    cache = model.new_cache(16)
    model.score_ids([5, 6, 7], cache=cache)
    with pytest.raises(
        rw.ConfigError, match="the cache holds 2 tokens, and scoring begins at the first; give an empty"
    ):
        model.score_ids([5, 6, 7], cache=cache)


def test_numbers_of_other_libraries_are_numbers(model):
    ids = np.array([5, 6, 7])
    assert torch.equal(model.score_ids(ids), model.score_ids([5, 6, 7]))
    params = rw.SamplingParams(max_new_tokens=np.int64(2), temperature=np.float32(0))
    assert model.generate_ids(ids, params).token_ids == model.generate_ids([5, 6, 7], greedy(2)).token_ids


@pytest.mark.parametrize("continuation", ["off", "exact"])
def test_a_stream_tells_how_much_of_the_prompt_was_read(model, continuation, monkeypatch):
    monkeypatch.setattr("ropewalk.engine.runners.runner.CHUNK", 32)
    steps = []
    params = rw.SamplingParams(max_new_tokens=1, continuation=continuation, temperature=0)
    "".join(model.stream(TEXT, params, progress=lambda start, count: steps.append((start, count))))
    assert len(steps) > 1 and steps[0][0] == 0
    assert all(start == sum(count for _, count in steps[:n]) for n, (start, _) in enumerate(steps))
    total = len(model.read(TEXT, continuation).ids)
    assert total - 8 <= sum(count for _, count in steps) <= total, "an uncertain end is read apart"


def test_a_stream_over_contexts_tells_it_of_all_rows(model):
    counts = []
    answer = model.over_contexts("Who?", [TEXT, TEXT[:40]], "mean", rw.SamplingParams(max_new_tokens=1))
    watched = model.stream(
        "Who?", rw.SamplingParams(max_new_tokens=1), contexts=[TEXT, TEXT[:40]], progress=lambda _, n: counts.append(n)
    )
    "".join(watched)
    assert len(counts) == 3 and abs(sum(counts) - answer.prompt_tokens) < 24


def test_each_answer_of_several_is_given_when_it_is_complete(model):
    params, given = rw.SamplingParams(max_new_tokens=3, temperature=0), {}
    prompts = [model.read(text, "auto") for text in ("import ", "def ", "class ")]
    answers = complete_all(model, prompts, params, lambda index, answer: given.setdefault(index, answer.text))
    assert given == dict(enumerate(answer.text for answer in answers))
