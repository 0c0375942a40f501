"""Prompts that end inside a token, from the model object and from plain transformers."""

import copy
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import ropewalk as rw
from ropewalk.tokenizer_tools.cover import cover

PROMPTS = [
    "import nump",
    "http:",
    "I'r",
    "x = 12",
    "if x:\n    ",
    "def main(\n\n",
    "x",
    "-" * 40,
    "a é",
    "白云",
    "self.f  ",
]
LATER = "def main(argv=None):\n    parser = argparse.ArgumentParser()\n    pars"


def greedy(continuation="auto", **kwargs):
    return rw.SamplingParams(max_new_tokens=10, temperature=0, continuation=continuation, **kwargs)


@pytest.fixture(scope="module")
def model(tiny_folder):
    return rw.load(tiny_folder)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_nothing_of_the_prompt_is_printed_again_and_nothing_is_missing(model, prompt):
    for seed in range(8):
        params = rw.SamplingParams(max_new_tokens=6, temperature=1, seed=seed, continuation="exact")
        completion = model.generate(prompt, params)
        read = completion.healing.prompt_ids if completion.healing else model.vocabulary.encode(prompt)
        whole = model.vocabulary.text_bytes([*read, *completion.token_ids])
        assert whole.startswith(prompt.encode())
        assert completion.text == whole[len(prompt.encode()) :].decode(errors="replace")
        assert completion.usage.prompt_tokens == len(read)


def test_a_word_is_finished(model):
    exact, off = (model.generate(LATER, greedy(mode)) for mode in ("exact", "off"))
    assert exact.text.startswith("er.add_")
    assert not off.text.startswith("er.")
    assert exact.healing.overlap == len("s")
    assert 0 <= exact.healing.aligned < 0.1
    assert off.healing is None


@pytest.mark.parametrize("text", ["é", "naïve 中", "👍🏽"])
def test_half_a_character_is_finished_and_shown_whole(model, text):
    data = ("x = '" + text).encode()
    for cut in range(1, len(text[-1].encode())):
        prompt = data[: len(data) - cut]
        completion = model.generate(prompt, greedy("exact"))
        assert completion.text
        logprobs = model.next_byte_logprobs(prompt)
        assert float(logprobs.exp().sum()) == pytest.approx(1, abs=1e-5)
        read = completion.healing.prompt_ids if completion.healing else cover(model.vocabulary, prompt).prompt
        whole = model.vocabulary.text_bytes([*read, *completion.token_ids])
        assert completion.text == whole[len(("x = '" + text[:-1]).encode()) :].decode(errors="replace")


def test_a_prompt_that_no_token_goes_over_is_decoded_as_ever_to_the_bit(model):
    prompt = next(p for p in ("x = (1)", "f(1)", "7", "a\n%") if cover(model.vocabulary, p).only_aligned)
    params = [
        rw.SamplingParams(max_new_tokens=12, temperature=1, seed=3, logprobs=2, continuation=c)
        for c in ("off", "exact", "auto")
    ]
    off, exact, auto = (model.generate(prompt, p) for p in params)
    assert off == exact == auto
    assert off.healing is None


def test_first_log_probability_is_of_the_cover_given_the_prompt(model):
    for prompt in ("import nump", LATER):
        completion = model.generate(prompt, greedy("exact", logprobs=3))
        read, token = completion.healing.prompt_ids, completion.logprobs[0]
        text = model.vocabulary.text_bytes([*read, token.id])
        ids = [*read, token.id]
        common_prefix = len(cover(model.vocabulary, prompt).common_prefix)
        given = model.logprob(prompt, given=model.vocabulary.text_bytes(ids[:common_prefix]))
        assert token.logprob <= 0
        assert text.startswith(prompt.encode())
        path = float(model.score_ids(ids, first=common_prefix).double().sum()) if common_prefix else None
        if path is not None and cover(model.vocabulary, model.vocabulary.text_bytes(ids[:common_prefix])).only_aligned:
            assert token.logprob == pytest.approx(path - given, abs=1e-3)
        assert token.top[token.id] == pytest.approx(token.logprob)
        assert len(token.top) <= 3


@pytest.mark.parametrize("given", ["import nump", "def f(", "x = 'naïve", LATER])
def test_chain_rule(model, given):
    for first, second in (("y as", " np"), (" ", "1"), ("é", "\n\n"), (")", ":\n    return")):
        both = model.logprob(first + second, given)
        assert both == pytest.approx(model.logprob(first, given) + model.logprob(second, given + first), abs=2e-3)


def test_next_bytes_are_those_of_logprob_and_sum_to_one(model):
    for given in ("import nump", "x = ", b"\xc3"):
        logprobs = model.next_byte_logprobs(given)
        assert logprobs.exp().sum() == pytest.approx(1, abs=1e-5)
        start = 0x80 if isinstance(given, bytes) else 0
        for byte in (logprobs[start : start + 64].topk(3).indices + start).tolist():
            assert float(logprobs[byte]) == pytest.approx(model.logprob(bytes([byte]), given), abs=2e-3)


def test_log_probability_of_a_text_whose_tokens_are_certain_is_its_score(model):
    text = "import os\n\n\nclass A:\n    pass\n"
    ids = model.vocabulary.encode(text)
    canonical = float(model.score_ids([model.tokenizer.bos_token_id, *ids]).double().sum())
    total = model.logprob(text)
    assert total >= canonical - 1e-3  # all texts that begin so, however they are cut at the end
    assert total == pytest.approx(canonical, abs=3)


def test_sampling_parameters_hold_for_the_first_token(model):
    best = model.generate(LATER, greedy("exact")).token_ids
    assert model.generate(LATER, rw.SamplingParams(max_new_tokens=10, top_k=1, seed=0)).token_ids == best
    assert model.generate(LATER, rw.SamplingParams(max_new_tokens=10, top_p=1e-6, seed=0)).token_ids == best
    drawn = [
        model.generate(
            "x", rw.SamplingParams(max_new_tokens=1, temperature=1, seed=seed, continuation="exact")
        ).token_ids[0]
        for seed in range(12)
    ]
    again = [
        model.generate(
            "x", rw.SamplingParams(max_new_tokens=1, temperature=1, seed=seed, continuation="exact")
        ).token_ids[0]
        for seed in range(12)
    ]
    assert drawn == again
    assert len(set(drawn)) > 3
    first = best[0]
    punished = model.generate(LATER + "er\n    pars", greedy("exact", repetition_penalty=50.0)).token_ids[0]
    assert punished != first


def test_a_stop_string_may_begin_in_the_first_token(model):
    whole = model.generate(LATER, greedy("exact")).text
    assert model.generate(LATER, greedy("exact", stop=whole[:2])).text == ""


def test_rows_of_a_list_are_what_they_are_alone(model):
    alone = [model.generate(prompt, greedy("exact")) for prompt in PROMPTS]
    assert model.generate(PROMPTS, greedy("exact")) == alone


def test_token_ids_are_taken_as_they_are_unless_asked(model):
    ids = model.vocabulary.encode(LATER)
    assert model.generate_ids(ids, greedy()) == model.generate(LATER, greedy("off"))
    assert model.generate_ids(ids, greedy("exact")) == model.generate(LATER, greedy("exact"))


def test_a_cache_of_the_prompt_is_used_and_left_with_the_answer(model):
    ids = model.vocabulary.encode(LATER)
    cache = model.new_cache(64)
    model.score_ids([*ids, 5], cache=cache)
    assert cache.get_seq_length() == len(ids)
    completion = model.generate_ids(ids, greedy("exact"), cache)
    expected = model.generate(LATER, greedy("exact"))
    assert completion.token_ids == expected.token_ids
    assert completion.healing.prompt_ids == expected.healing.prompt_ids
    read = [*completion.healing.prompt_ids, *completion.token_ids[:-1]]
    assert cache.get_seq_length() == len(read)
    fresh = model.new_cache(64)
    model.score_ids([*read, 5], cache=fresh)
    for a, b in zip(cache.layers, fresh.layers, strict=True):
        assert torch.allclose(a.keys[:, :, : len(read)], b.keys[:, :, : len(read)], atol=1e-4)


def test_after_a_chat_header_the_border_is_taken_as_given(model):
    chatting = copy.copy(model)
    chatting.tokenizer = copy.deepcopy(model.tokenizer)
    chatting.tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[answer] {% endif %}"
    )
    prompt = chatting.tokenizer.apply_chat_template(
        [{"role": "user", "content": "import nump"}], tokenize=False, add_generation_prompt=True
    )
    assert not cover(model.vocabulary, prompt).only_aligned
    assert chatting.generate(prompt, greedy("auto")).healing is None
    assert chatting.generate(prompt, greedy("exact")).healing is not None
    assert chatting.generate(prompt + "import nump", greedy("auto")).healing is not None
    assert model.generate(prompt, greedy("auto")).healing is not None


def test_wrong_policies_and_prompts_are_refused(model):
    with pytest.raises(rw.ConfigError, match=r"continuation 'exakt'.*Did you mean 'exact'"):
        rw.SamplingParams(continuation="exakt")
    with pytest.raises(rw.DataError, match="not UTF-8 at byte 1"):
        model.generate(b"a\xff", greedy())


def test_without_a_start_token_a_prompt_of_which_nothing_is_certain_is_taken_as_it_is(model):
    unstarted = copy.copy(model)
    unstarted.tokenizer = copy.deepcopy(model.tokenizer)
    unstarted.tokenizer.bos_token = None
    assert unstarted.generate("x", greedy("auto")) == model.generate("x", greedy("off"))
    with pytest.raises(rw.ConfigError, match="no start token"):
        unstarted.generate("x", greedy("exact"))
    with pytest.raises(rw.ConfigError, match="the prompt is empty"):
        unstarted.generate("", greedy("auto"))


@pytest.fixture(scope="module")
def plain(tiny_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    return AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval(), tokenizer


@pytest.mark.parametrize("spec", ["none", "rerope:64|logn"])
def test_healed_prompts_in_transformers_generate_are_what_the_model_object_writes(model, plain, spec):
    hf, tokenizer = plain
    model.rope = spec
    try:
        with rw.patch(hf, spec):
            healed = rw.heal(hf, tokenizer, PROMPTS, rw.SamplingParams(temperature=0, continuation="exact"))
            output = hf.generate(
                healed.input_ids,
                attention_mask=healed.attention_mask,
                do_sample=False,
                max_new_tokens=6,
                pad_token_id=0,
            )
        for prompt, text in zip(PROMPTS, healed.texts(output), strict=True):
            expected = model.generate(prompt, greedy("exact")).text
            shorter = min(len(text), len(expected))
            assert shorter >= 4
            assert text[:shorter] == expected[:shorter], prompt
    finally:
        model.rope = None


def test_one_healed_prompt(plain):
    hf, tokenizer = plain
    healed = rw.heal(hf, tokenizer, LATER, rw.SamplingParams(temperature=0))
    assert healed.input_ids.shape == healed.attention_mask.shape
    assert math.isclose(healed.attention_mask.sum(), healed.input_ids.numel())
    assert healed.healings[0].nodes > 1
    output = hf.generate(healed.input_ids, attention_mask=healed.attention_mask, do_sample=False, max_new_tokens=4)
    assert healed.texts(output)[0].startswith("er.add_")


def test_a_healed_prompt_draws_the_same_in_any_list(model, plain):
    params = rw.SamplingParams(max_new_tokens=1, temperature=1, seed=7)
    for row, prompt in zip(rw.heal(*plain, PROMPTS * 2, params).input_ids.tolist(), PROMPTS * 2, strict=True):
        alone = rw.heal(*plain, prompt, params)
        assert row[-alone.input_ids.shape[1] :] == alone.input_ids[0].tolist()
        if alone.healings[0] is not None:
            assert row[-1] == model.generate(prompt, params).token_ids[0]


def test_a_healed_prompt_whose_text_ends_at_once(model, plain):
    hf, tokenizer = plain
    params = next(
        params
        for params in (rw.SamplingParams(max_new_tokens=1, temperature=1, seed=seed) for seed in range(2000))
        if model.generate("he went.\n\n\n", params).token_ids[0] in model.stop_ids
    )
    healed = rw.heal(hf, tokenizer, "he went.\n\n\n", params)
    assert healed.ended == [True]
    output = hf.generate(healed.input_ids, attention_mask=healed.attention_mask, do_sample=False, max_new_tokens=4)
    assert healed.texts(output) == [""]


def test_no_prompts_to_heal(plain):
    with pytest.raises(rw.ConfigError, match="prompts is empty"):
        rw.heal(*plain, [])
