"""Prompts by name on the real model and its 49k vocabulary."""

import pytest
import torch

import ropewalk as rw
from ropewalk.engine.model import Model
from ropewalk.tokenizer_tools.cover import cover

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def model():
    return rw.load("smollm2-135m", precision="float32", kv_dtype="float32")


@pytest.fixture(scope="module")
def chatting(model):
    """The same model, for prompts that a chat template made."""
    return Model(model.hf, model.tokenizer, name="smollm2-135m", special_tokens=True)


def greedy(continuation="exact", tokens=6):
    return rw.SamplingParams(max_new_tokens=tokens, temperature=0, continuation=continuation)


@pytest.mark.parametrize(
    ("prompt", "begins"),
    [
        ("import nump", "y"),
        ("import numpy as n", "p"),
        ("See https:", "//"),
        ("Once upon a ti", "me"),
        ("The capital of France is ", "Paris"),
        ("I'r", "e"),
        ("#!/usr/bin/en", "v python"),
        ("1, 2, 3, 4, 5, 6, 7, ", "8"),
        ("def f(x):\n    retur", "n "),
        ("中国的首都是北".encode() + "京".encode()[:1], "京"),
    ],
)
def test_the_word_is_finished(model, prompt, begins):
    assert model.generate(prompt, greedy()).text.startswith(begins)


@pytest.mark.parametrize("prompt", ["import nump", "The capital of France is ", "Once upon a ti"])
def test_the_next_byte_is_all_but_certain_and_a_border_there_misses_it(model, prompt):
    expected = model.generate(prompt, greedy()).text.encode()[0]
    assert model.next_byte_logprobs(prompt)[expected].exp() > 0.5
    assert not model.generate(prompt, greedy("off")).text.encode().startswith(bytes([expected]))


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "<|im_start|>",
        "<|endoftext|>",
        "h",
        "-" * 40,
        "a\n\n",
        "x  ",
        "白云",
        "白云机场",
        "\N{COMBINING ACUTE ACCENT}",
    ],
)
def test_any_prompt_is_continued_with_nothing_of_it_printed_again(model, prompt):
    completion = model.generate(prompt, greedy())
    read = completion.healing.prompt_ids if completion.healing else list(cover(model.vocabulary, prompt).prompt)
    whole = model.vocabulary.text_bytes([*read, *completion.token_ids])
    text = cover(model.vocabulary, prompt).text
    assert completion.text.encode() + completion.unfinished == whole[len(text) :]
    assert whole.startswith(text)


def test_the_chinese_example_of_the_post(model):
    """白云 may continue as 白云机场; both are weighed if the vocabulary has a token for the longer one."""
    chain = model.logprob("机场", given="白云")
    steps = [model.logprob("机", given="白云"), model.logprob("场", given="白云机")]
    assert chain == pytest.approx(sum(steps), abs=2e-3)


def test_a_special_token_at_the_end_is_a_border(chatting):
    assert cover(chatting.vocabulary, "some text<|im_end|>").only_aligned
    assert chatting.generate("some text<|im_end|>", greedy()).healing is None


def test_after_the_chat_header_nothing_is_drawn_again(chatting):
    chat = [{"role": "user", "content": "Say hello."}]
    prompt = chatting.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert chatting.generate(prompt, greedy("auto")).healing is None
    begun = chatting.generate(prompt + "Hello! How can I hel", greedy("auto"))
    assert begun.text.startswith("p")


@pytest.fixture(scope="module")
def modules():
    """The same model, run by transformers' modules."""
    return rw.load("smollm2-135m", compile=False)


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["yarn:4", "rerope:8|logn", "self-extend:8,window=8"])
def test_every_scaler_gives_the_distribution_that_transformers_modules_give(model, modules, spec):
    text = "It was a dark and stormy night; the rain fell in torrents. " * 4 + "import nump"
    untouched = model.next_byte_logprobs(text)
    model.rope = modules.rope = spec
    try:
        logprobs = model.next_byte_logprobs(text)
        assert torch.allclose(logprobs.exp(), modules.next_byte_logprobs(text).exp(), atol=1e-6)
        assert not torch.allclose(logprobs.exp(), untouched.exp(), atol=2e-4)
        assert logprobs.argmax() == ord("y")
    finally:
        model.rope = modules.rope = None
