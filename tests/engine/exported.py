"""Logits of exported models, to compare them with the models in memory."""

import torch
from transformers import AutoModelForCausalLM

import ropewalk as rw

TRAINED = 256


IDS = torch.arange(2 * 300).reshape(2, 300) % 1000


def logits(model):
    with torch.inference_mode():
        return model(IDS).logits


def stock(folder):
    return logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager"))


def relative_difference(ours, theirs):
    """The largest difference, in units of the largest logit."""
    return (ours - theirs).abs().max() / theirs.abs().max()


def patched(model, spec, length=None):
    with rw.patch(model, spec, length=length):
        return logits(model)
