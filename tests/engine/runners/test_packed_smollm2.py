"""The real model from the blocks of its file computes what their weights say."""

import pytest
import torch
from decoders import in_chunks

import ropewalk as rw
from ropewalk.engine.runners.decoder_runner import MAX_STEP_TOKENS
from ropewalk.evals.data import load_text

pytestmark = pytest.mark.model
TOKENS = 256


def test_blocks_give_the_distributions_of_the_expanded_weights():
    """By compiled steps, which multiply by blocks, and by one chunk of the text, which unpacks them."""
    exact = {"kv_dtype": "float32", "precision": "float32"}
    plain, packed = (rw.load("smollm2-135m", dtype=dtype, **exact) for dtype in ("float32", "auto"))
    assert (plain.precision, packed.precision) == ("float32", "Q4_1 + Q8_0, float32 cache, float32 arithmetic")
    ids = torch.tensor([plain.tokenizer(load_text("kjv").documents[0][:4000]).input_ids[:TOKENS]])
    expected = logprobs(plain, ids, TOKENS)
    loss = own(expected, ids)
    assert 1 < loss < 3
    for tokens in (MAX_STEP_TOKENS, TOKENS):
        found = logprobs(packed, ids, tokens)
        divergence = (expected.exp() * (expected - found)).sum(-1)
        assert divergence.max() < 1e-8
        assert own(found, ids) == pytest.approx(loss, abs=2e-6)


def logprobs(model, ids, tokens):
    with model.running(None) as runner:
        logits = in_chunks(runner, [tokens], ids, model.new_cache(ids.shape[1]))
    return logits.double().log_softmax(-1)


def own(logprobs, ids):
    """The mean loss of the tokens."""
    return -float(logprobs[:-1].gather(1, ids[0, 1:, None]).mean())
