"""A text of 200 tokens, longer than small models were trained on, and the ways to read it."""

import itertools

import pytest
import torch
from serving import logits
from transformers import DynamicCache

# most of it is beyond the reach of some map: what is held together is exact at any length
beyond_reach = pytest.mark.filterwarnings("ignore:.*some distances are longer than in training:UserWarning")

IDS = torch.arange(3, 203).remainder(95)[None] + 1  # 0 is padding
MAPS = ["rerope:20", "leaky-rerope:20,k=4", "self-extend:4,window=20", "dual-chunk", "string:window=5", "jet-long:20"]
MAPS += ["dpe:5/1/2/8,window=20", "self-logistic:20,rate=0.2,capacity=6"]
SPECS = [
    *MAPS,
    "sink-window:40",
    "logn",
    "logn:2",
    "infoscale",
    "step-log:0.3,length=30",
    "temperature:1.2",
    "yarn:4",
    "dynamic-ntk",
    "dynamic-yarn:step=16",
    "ntk:4|rerope:20|logn",
    "dynamic-ntk|dual-chunk|temperature:1.1",
    "resonance|self-extend:4,window=20|logn",
    "yarn:2@0|yarn:4@1-",
    "dynamic-yarn:step=16@1|rerope:20@0|logn@1",
]


def read(model, ids=IDS, **inputs):
    """Logits of the whole text in one call."""
    return logits(model, ids, **inputs)


@torch.inference_mode()
def in_chunks(model, cuts, cache=None):
    """Logits of the text read in chunks, into a cache."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    edges = itertools.pairwise([0, *cuts, IDS.shape[1]])
    return torch.cat([model(input_ids=IDS[:, a:b], past_key_values=cache).logits for a, b in edges], 1)


def left_padded(*lengths):
    """Rows with the first tokens of the text, of these lengths, padded with 0 on the left; and their mask."""
    width = max(lengths)
    rows = [torch.cat((torch.zeros(width - n, dtype=torch.long), IDS[0, :n])) for n in lengths]
    mask = torch.stack([(torch.arange(width) >= width - n).long() for n in lengths])
    return torch.stack(rows), mask
