"""The check of a family under `patch`: it gives a row of docs/families.md, or an assertion fails."""

import functools
import logging
from contextlib import contextmanager

import torch
from families import FAMILIES, WITHOUT_YARN, YARN

import ropewalk as rw
from ropewalk.engine.attention.reference import reference_attention
from ropewalk.engine.attention.rotation import Layout
from ropewalk.engine.patches import band_patch

TOLERANCE = 2e-5  # of the largest logit; float32, and one family runs its layers 16 times
IDS = torch.arange(1, 91).remainder(96)[None]

logging.getLogger("transformers").setLevel(logging.ERROR)


@torch.inference_mode()
def logits(model, ids=IDS, **inputs):
    return model(input_ids=ids, use_cache=False, **inputs).logits


def difference(x, expected):
    """The largest difference, relative to the largest entry."""
    return float((x - expected).abs().max() / expected.abs().max())


def reason(error):
    """The first clause of a refusal, without the class name before it."""
    text = str(error).split(";")[0].split(", so ")[0]
    head, colon, rest = text.partition(": ")
    if colon and " " not in head:
        return rest
    first, _, rest = text.partition(" ")
    return rest if first.endswith("LM") else text


def frequencies(name, model):
    """Static frequencies: a YaRN patch is the same architecture under a YaRN config, and undo is exact."""
    before, buffers = logits(model), dict(model.named_buffers())
    try:
        handle = rw.patch(model, "yarn:4")
    except rw.RopewalkError as error:
        assert torch.equal(logits(model), before)
        return f"refused: {reason(error)}"
    patched = logits(model)
    assert handle.describe()
    handle.undo()
    assert {key: id(value) for key, value in model.named_buffers()} == {key: id(buffers[key]) for key in buffers}
    assert torch.equal(logits(model), before)
    assert not torch.equal(patched, before)
    if name not in WITHOUT_YARN:
        assert difference(patched, logits_under_yarn(name)) < TOLERANCE
    return "served"


@functools.lru_cache(1)  # of the family that is checked
def logits_under_yarn(name):
    """What transformers computes where the config itself asks for YaRN."""
    return logits(FAMILIES[name](rope_parameters=YARN))


def bands(name, model):
    """Position maps: short distances, padding and caches change nothing, and undo is exact."""
    before, short = logits(model), logits(model, IDS[:, :50])
    try:
        handle = rw.patch(model, "rerope:60")
    except rw.RopewalkError as error:
        assert torch.equal(logits(model), before)
        return f"refused: {reason(error)}"
    assert difference(logits(model, IDS[:, :50]), short) < TOLERANCE
    handle.undo()
    assert torch.equal(logits(model), before)
    if name not in WITHOUT_YARN:  # 250 of the 256 tokens that YaRN carries: all 90 are near
        with rw.patch(model, "yarn:4|rerope:250"):
            assert difference(logits(model), logits_under_yarn(name)) < TOLERANCE
    padded_by_itself = padding_error(model)
    with rw.patch(model, "rerope:16|logn"):
        mapped = logits(model)
        assert difference(mapped, before) > 1e-3
        with literal_attention():
            assert difference(mapped, logits(model)) < TOLERANCE
        assert padding_error(model) < max(TOLERANCE, 2 * padded_by_itself)
    assert torch.equal(logits(model), before)
    return "served"


def padding_error(model):
    """The difference between a left-padded row of a batch and the same row alone."""
    ids = torch.cat((IDS, torch.cat((torch.zeros(1, 10, dtype=torch.long), IDS[:, :80]), 1)))
    mask = torch.ones(2, 90, dtype=torch.long)
    mask[1, :10] = 0
    two = logits(model, ids, attention_mask=mask)
    return max(difference(two[:1], logits(model)), difference(two[1:, 10:], logits(model, IDS[:, :80])))


class Given:
    """The frequencies, bands and temperature of a segment, in the form of a scaler for the reference."""

    def __init__(self, segment):
        self.frequencies = lambda *_: segment.frequencies
        self.bands = lambda *_: segment.bands
        self.logit_factor = lambda i, _: torch.ones_like(i) if segment.temperature is None else segment.temperature
        self.growing_length = lambda *_: 0


@contextmanager
def literal_attention():
    """Within it, patched models use the reference instead of banded attention."""
    ours = band_patch.banded_attention

    def twin(q, k, v, score, layout, work, sinks=None, _=None):
        [(_, [segment])] = work
        nothing = Layout(0, 0, False)
        return reference_attention(q, k, v, score, layout or nothing, Given(segment), None, sinks_H=sinks)

    band_patch.banded_attention = twin
    try:
        yield
    finally:
        band_patch.banded_attention = ours
