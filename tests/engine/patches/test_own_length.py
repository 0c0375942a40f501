"""Models with a scaling in their config that depends on the length: dynamic NTK, and LongRoPE with two lists."""

import pytest
import torch
from families import DEFAULT, FAMILIES
from serving import TOLERANCE, difference, logits

import ropewalk as rw
from ropewalk.scaling import hf
from ropewalk.scaling.spec import parse

PAIRS = 8
OWN = {
    "dynamic": {**DEFAULT, "rope_type": "dynamic", "factor": 4.0},
    "longrope": {
        **DEFAULT,
        "rope_type": "longrope",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "short_factor": [1.0 + 0.1 * i for i in range(PAIRS)],
        "long_factor": [1.5 + 0.5 * i for i in range(PAIRS)],
    },
}
LONG = torch.arange(1, 101).remainder(96)[None] + 1
SHORT = LONG[:, 7:47] * 3 % 96 + 1
SPECS = ("logn", "temperature:1.2", "resonance", "resonance|logn", "rerope:32")

pytestmark = pytest.mark.parametrize("kind", OWN)


def model_of(kind, family="llama"):
    model = FAMILIES[family](rope_parameters=OWN[kind])
    if kind == "longrope":
        model.config.max_position_embeddings = 256
    return model


def batch():
    """The inputs of a batch: a long row, and a short one with padding before it."""
    before = LONG.shape[1] - SHORT.shape[1]
    ids = torch.cat([LONG, torch.nn.functional.pad(SHORT, (before, 0))])
    mask = torch.ones_like(ids)
    mask[1, :before] = 0
    return ids, {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


@pytest.mark.parametrize("spec", SPECS)
def test_a_row_of_a_batch_is_the_row_alone(kind, spec):
    model = model_of(kind)
    with rw.patch(model, spec):
        ids, inputs = batch()
        together = logits(model, ids, **inputs)[1, -SHORT.shape[1] :]
        assert difference(together, logits(model, SHORT)[0]) < TOLERANCE


@pytest.mark.parametrize("spec", SPECS)
def test_earlier_texts_change_nothing(kind, spec):
    model = model_of(kind)
    with rw.patch(model, spec):
        fresh = logits(model, SHORT)
        logits(model, LONG)
        assert torch.equal(logits(model, SHORT), fresh)


@pytest.mark.parametrize("spec", [*SPECS, "none", "yarn:8"])
def test_a_model_that_has_read_a_long_text_is_patched_as_a_new_one(kind, spec):
    old, new = model_of(kind), model_of(kind)
    logits(old, LONG)
    with rw.patch(old, spec), rw.patch(new, spec):
        assert torch.equal(logits(old, LONG), logits(new, LONG))


@pytest.mark.parametrize("spec", [*SPECS, "none", "yarn:8"])
@pytest.mark.parametrize("before", [SHORT, LONG])
def test_undo_forgets_texts_read_under_the_patch(kind, spec, before):
    """transformers remembers the longest text so far, which a text of medium length shows."""
    between = LONG[:, :80]
    model, untouched = model_of(kind), model_of(kind)
    for each in (model, untouched):
        logits(each, before)
    buffers = dict(model.named_buffers())
    with rw.patch(model, spec):
        logits(model, torch.cat([LONG, LONG], 1))
    after = dict(model.named_buffers())
    assert all(after[name] is buffers[name] for name in buffers)
    assert torch.equal(logits(model, between), logits(untouched, between))


@pytest.mark.parametrize("length", [48, 100])
def test_resonance_over_it_has_the_frequencies_of_the_length(kind, length):
    model = model_of(kind)
    rope = hf.read(model.config)[None]
    right = rope.effective(parse("resonance")).frequencies(rope.rope, length).inv_freq
    with rw.patch(model, "resonance", length=length):
        assert torch.allclose(model.model.rotary_emb.inv_freq.double(), right, rtol=1e-6)
    fixed, growing = model_of(kind), model_of(kind)
    with rw.patch(growing, "resonance") as handle, rw.patch(fixed, "resonance", length=64):
        assert "grows with each sequence" in handle.describe()
        assert difference(logits(growing, LONG[:, :64]), logits(fixed, LONG[:, :64])) < TOLERANCE


def test_under_none_it_is_the_untouched_model(kind):
    model = model_of(kind)
    before = logits(model, SHORT)
    with rw.patch(model, "none") as handle:
        assert torch.equal(logits(model, SHORT), before)
        assert torch.equal(logits(model, LONG), logits(model_of(kind), LONG))
        assert "as in transformers" in handle.describe()
    with rw.patch(model, "none", length=100):
        assert difference(logits(model, LONG[:, :100]), logits(model_of(kind), LONG)) < TOLERANCE


def test_a_second_patch_over_none_is_refused(kind):
    model = model_of(kind)
    with rw.patch(model, "none"), pytest.raises(rw.PatchError, match="patched with none already"):
        rw.patch(model, "yarn:8")
