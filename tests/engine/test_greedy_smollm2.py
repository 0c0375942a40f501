"""The fast engine on the real model: its greedy text is transformers'."""

import pytest
import torch

import ropewalk as rw
from ropewalk.engine.checkpoints.checkpoint import read_weights
from ropewalk.engine.checkpoints.config import find_config

pytestmark = [pytest.mark.model, pytest.mark.slow]

PROMPTS = [
    "The history of the rope begins",
    "def quicksort(items):\n",
    "Once upon a time, in a town by the sea,",
    "Dear Sir or Madam,\n\nI am writing to",
    "Water boils at a lower temperature on a mountain because",
    "1, 1, 2, 3, 5, 8, 13,",
    "<html>\n<head>\n",
    "The three most important rules of chess are:\n1.",
    "In the year 1815 the",
    '{"name": "Ada", "age": 36, ',
]


def test_greedy_tokens_on_ten_prompts_are_those_of_transformers():
    """A token is transformers' greedy one if it has the highest logit after the same tokens, read at once.

    All prompts are answered together, shortly, and one is answered at length, alone.
    """
    model = rw.load("smollm2-135m", dtype="float32", compile=True)
    reference = read_weights(*find_config("smollm2-135m"), dtype=torch.float32)
    for prompts, tokens in ((PROMPTS, 16), (PROMPTS[2:3], 60)):
        params = rw.SamplingParams(max_new_tokens=tokens, temperature=0, continuation="off")
        for prompt, completion in zip(prompts, model.generate(prompts, params), strict=True):
            prompt_ids = model.tokenizer(prompt).input_ids
            with torch.inference_mode():
                logits = reference(torch.tensor([prompt_ids + completion.token_ids]), use_cache=False).logits[0]
            greedy = logits[len(prompt_ids) - 1 : -1].argmax(-1).tolist()
            assert completion.token_ids == greedy, prompt
            assert len(greedy) == tokens or completion.finish_reason == "stop", prompt
