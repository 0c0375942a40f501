"""Unknown releases of transformers: the behaviour of the model decides, and not the version."""

import pytest
import torch
import transformers
from families import FAMILIES
from serving import TOLERANCE, difference, logits
from transformers.models.llama import modeling_llama

import ropewalk as rw

STATIC, MAP = "yarn:4", "rerope:60"  # all 50 tokens of a text are near, so the map changes nothing


@pytest.fixture(autouse=True)
def newer(monkeypatch):
    """The version of a future release."""
    monkeypatch.setattr(transformers, "__version__", "5.999.0")


def neighbours(q, k, cos, sin, *_, **__):
    """Pairs of neighbours instead of halves."""

    def rotate(x):
        pairs = x.unflatten(-1, (-1, 2))
        c, s = (t.unsqueeze(1)[..., : t.shape[-1] // 2] for t in (cos, sin))
        one, two = pairs.unbind(-1)
        return torch.stack((one * c - two * s, two * c + one * s), -1).flatten(-2)

    return rotate(q), rotate(k)


def test_another_layout_of_pairs_is_found(monkeypatch):
    model = FAMILIES["llama"]()
    halves = logits(model)
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", neighbours)
    before = logits(model)
    short = logits(model, torch.arange(1, 51)[None])
    assert difference(before, halves) > 1e-3
    with rw.patch(model, MAP):
        assert difference(logits(model, torch.arange(1, 51)[None]), short) < TOLERANCE
    with rw.patch(model, STATIC):
        assert difference(logits(model), before) > 1e-3
    assert torch.equal(logits(model), before)


def norm_behind(q, k, cos, sin, *_, **__):
    """A norm between the rotation and attention."""
    q, k = neighbours(q, k, cos, sin)
    return q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)


def turned_backwards(q, k, cos, sin, *_, **__):
    """The same scores by an unknown rotation."""
    return neighbours(q, k, cos, -sin)


@pytest.mark.parametrize("change", [norm_behind, turned_backwards])
def test_a_rotation_of_another_kind_is_refused_for_maps(monkeypatch, change):
    model = FAMILIES["llama"]()
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", change)
    before = logits(model)
    with pytest.raises(rw.UnsupportedModel, match="does more to queries and keys than rotate pairs"):
        rw.patch(model, MAP)
    assert torch.equal(logits(model), before)


def angles_from_config(self, x, position_ids):
    """A rotary module that no longer reads its buffer."""
    frequencies = 1e4 ** -(torch.arange(0, 16, 2) / 16)
    rotation = (position_ids[:, :, None] * frequencies).repeat(1, 1, 2)
    return rotation.cos(), rotation.sin()


def test_angles_that_do_not_come_from_the_buffer_are_refused(monkeypatch):
    model = FAMILIES["llama"]()
    monkeypatch.setattr(modeling_llama.LlamaRotaryEmbedding, "forward", angles_from_config)
    before = logits(model)
    with pytest.raises(rw.UnsupportedModel, match="computes its angles anew in every call"):
        rw.patch(model, STATIC)
    assert torch.equal(logits(model), before)


def test_frequencies_under_another_name_or_of_another_formula_are_refused():
    renamed = FAMILIES["llama"]()
    rotary = renamed.model.rotary_emb
    rotary._buffers["frequencies"] = rotary._buffers.pop("inv_freq")
    with pytest.raises(rw.UnsupportedModel, match="laid out in a way ropewalk does not know"):
        rw.patch(renamed, STATIC)
    other = FAMILIES["llama"]()
    other.model.rotary_emb.inv_freq = other.model.rotary_emb.inv_freq**1.01
    with pytest.raises(rw.UnsupportedModel, match="not those of its config"):
        rw.patch(other, STATIC)


def test_attention_outside_of_the_registry_is_refused_for_maps(monkeypatch):
    model = FAMILIES["llama"]()
    sdpa = modeling_llama.ALL_ATTENTION_FUNCTIONS["sdpa"]
    monkeypatch.setattr(modeling_llama.ALL_ATTENTION_FUNCTIONS.__class__, "get_interface", lambda *_: sdpa)
    before = logits(model)
    with pytest.raises(rw.UnsupportedModel, match="does not call attention through transformers' attention registry"):
        rw.patch(model, MAP)
    with rw.patch(model, STATIC):
        assert difference(logits(model), before) > 1e-3
    assert torch.equal(logits(model), before)


def test_attention_with_more_terms_is_refused_for_maps(monkeypatch):
    """An example is a bias that grows with the distance, which our attention does not have."""
    model = FAMILIES["llama"]()
    sdpa = modeling_llama.ALL_ATTENTION_FUNCTIONS["sdpa"]

    def biased(module, query, key, value, attention_mask, **kwargs):
        at = torch.arange(key.shape[2], dtype=query.dtype)
        bias = (at - at[:, None]).masked_fill(at > at[:, None], -torch.inf)[None, None]
        return sdpa(module, query, key, value, bias, **kwargs)

    monkeypatch.setitem(modeling_llama.ALL_ATTENTION_FUNCTIONS, "sdpa", biased)
    before = logits(model)
    with pytest.raises(rw.UnsupportedModel, match="does not reproduce"):
        rw.patch(model, MAP)
    assert torch.equal(logits(model), before)
