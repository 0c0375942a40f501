"""Position maps and temperatures refuse what they cannot do, and a patch that fails leaves no trace."""

import copy
import warnings
from functools import partial

import pytest
import torch
from families import FAMILIES
from long_text import IDS, beyond_reach, read
from transformers import DynamicCache, StaticCache

import ropewalk as rw
from ropewalk.engine.patches import band_patch

pytestmark = beyond_reach


def test_calls_that_do_not_work_are_refused_by_name(llama):
    with rw.patch(llama, "rerope:20"):
        with pytest.raises(rw.PatchError, match="output_attentions=True does not work"):
            llama(input_ids=IDS, output_attentions=True)
        mask = torch.ones(1, 200, dtype=torch.long)
        mask[0, 50:60] = 0
        with pytest.raises(
            rw.PatchError, match="of row 0 hides tokens in the middle of the text; pad on the left or on the right"
        ):
            llama(input_ids=IDS, attention_mask=mask)
        square = torch.ones(1, 1, 200, 200, dtype=torch.bool)
        with pytest.raises(rw.PatchError, match="is not causal over its texts"):
            llama(input_ids=IDS, attention_mask=square)
        with torch.no_grad():
            causal = read(llama, IDS, attention_mask=square.tril())
        assert torch.equal(causal, read(llama))
        with pytest.raises(rw.PatchError, match="do not count up by one"):
            llama(input_ids=IDS[:, :4], attention_mask=torch.ones(1, 4), position_ids=torch.tensor([[0, 2, 4, 6]]))
        cache = DynamicCache(config=llama.config)
        llama(input_ids=IDS[:, :20], past_key_values=cache)
        with pytest.raises(rw.PatchError, match="position ids must also count the tokens in the cache"):
            llama(input_ids=IDS[:, :4], past_key_values=cache, position_ids=torch.arange(4)[None])
        dropped = DynamicCache(config=llama.config)
        llama(input_ids=IDS[:, :20], past_key_values=dropped)
        for layer in dropped.layers:  # as cache compression does
            layer.keys, layer.values = (x[:, :, [0, 1, *range(10, 20)]] for x in (layer.keys, layer.values))
            layer.length = 12
        with pytest.raises(rw.PatchError, match="row 0 has 16 keys, and its last position is 23: its cache"):
            llama(input_ids=IDS[:, :4], past_key_values=dropped, position_ids=torch.arange(20, 24)[None])


@pytest.mark.parametrize("kind", [DynamicCache, partial(StaticCache, max_cache_len=300)])
def test_a_cache_that_the_unpatched_model_filled_is_refused(llama, kind):
    """Its keys are rotated; before, they were rotated once more."""
    filled = kind(config=llama.config)
    with torch.no_grad():
        llama(input_ids=IDS[:, :150], past_key_values=filled)
        with rw.patch(llama, "rerope:20"):
            with pytest.raises(rw.PatchError, match="filled without the patch"):
                llama(input_ids=IDS[:, 150:], past_key_values=filled)
            begun = kind(config=llama.config)
            llama(input_ids=IDS[:, :150], past_key_values=begun)
            forked = copy.deepcopy(begun)
            got = llama(input_ids=IDS[:, 150:], past_key_values=forked).logits
            torch.testing.assert_close(got, read(llama)[:, 150:], rtol=0, atol=1e-4)


def test_maps_that_do_not_fit_are_refused_with_numbers(llama):
    with pytest.raises(rw.ConfigError, match="rerope: window 64 must be below 64, the length that the model reaches"):
        rw.patch(llama, "rerope:64")
    with pytest.raises(rw.ConfigError, match=r"reaches 144 tokens on this model, fewer than the 256 asked for"):
        rw.patch(llama, "self-extend:3,window=24", length="4x")
    rw.patch(llama, "self-extend:3,window=24", length=144).undo()
    rw.patch(llama, "yarn:4|rerope:200").undo()
    assert read(llama).isfinite().all()


def test_a_text_beyond_the_reach_warns_once(llama):
    with rw.patch(llama, "self-extend:3,window=24"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            read(llama, IDS[:, :144])
        with pytest.warns(UserWarning, match="reaches 144 tokens on this model and the text has 145") as told:
            read(llama, IDS[:, :145])
        assert "/tests/engine/" in told[0].filename, "not in transformers, which calls us"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            read(llama)


def test_describe_names_tier_bands_reach_and_cost(llama):
    with rw.patch(llama, "ntk:4|rerope:20|logn") as handle:
        text = handle.describe()
        assert handle.reach == float("inf")
    for part in ("ntk:4|rerope:20|logn", "position bands", "near, far", "any length (trained: 64)", "scored once"):
        assert part in text
    with rw.patch(llama, "dynamic-ntk") as handle:
        assert "grows with each sequence, in steps of 8 beyond 64" in handle.describe()
    with rw.patch(llama, "dynamic-ntk", length="4x") as handle:
        assert "fixed at 256 tokens" in handle.describe()
        assert "static frequencies" in handle.describe()
    with rw.patch(llama, "logn") as handle:
        assert "temperature: queries are multiplied" in handle.describe()


def test_a_failed_patch_leaves_the_model_as_it_was(llama, monkeypatch):
    before = read(llama)
    monkeypatch.setattr(band_patch, "banded_attention", lambda q, *_: q * 0)
    with pytest.raises(rw.UnsupportedModel, match="does not reproduce"):
        rw.patch(llama, "rerope:20")
    monkeypatch.undo()
    assert torch.equal(read(llama), before)
    rw.patch(llama, "rerope:20").undo()


@pytest.mark.parametrize(("spec", "runs"), [("yarn:4", 1), ("yarn:4|logn", 1), ("yarn:4|rerope:20|logn", 4)])
def test_an_interrupted_patch_leaves_the_model_as_it_was(spec, runs):
    model = FAMILIES["llama"]()
    before, buffers = read(model), dict(model.named_buffers())
    for last in range(1, runs + 1):
        left = iter(range(last, 0, -1))

        def interrupt(*_, left=left):
            if next(left) == 1:
                raise KeyboardInterrupt

        hook = model.lm_head.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            rw.patch(model, spec)
        hook.remove()
        assert torch.equal(read(model), before)
        assert all(value is buffers[name] for name, value in model.named_buffers())
        assert not model._forward_pre_hooks
        assert not model.model.rotary_emb._forward_pre_hooks
    rw.patch(model, spec).undo()


def test_a_model_that_computes_differently_when_patched_is_refused(monkeypatch):
    """Falcon, for example. A patch must give the logits of the unpatched model, and not those of the probe."""
    model = FAMILIES["llama"]()
    forward = model.lm_head.forward
    layer, name = model.model.layers[0].self_attn, model.config._attn_implementation
    monkeypatch.setattr(
        model.lm_head, "forward", lambda x: forward(x) * (1 if layer.config._attn_implementation == name else 2)
    )
    with pytest.raises(rw.UnsupportedModel, match="does not reproduce"):
        rw.patch(model, "rerope:20")
