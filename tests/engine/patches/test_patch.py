"""`patch` compared with scaled models of transformers, and exact undo."""

import gc

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from families import DEFAULT, FAMILIES
from serving import IDS, TOLERANCE, difference, logits
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, GPT2Config
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import ropewalk as rw
from ropewalk.engine.rotary_site import primary_rotary, rotary_sites
from ropewalk.scaling import InfoScale

SOME = ("llama", "mistral", "qwen2", "qwen3", "cohere", "gpt_neox", "gemma3_text")


def llama(**rope):
    return FAMILIES["llama"](rope_parameters={**DEFAULT, **rope})


@pytest.mark.parametrize(
    ("spec", "rope"),
    [
        ("linear:4", {"rope_type": "linear", "factor": 4.0}),
        ("yarn:4", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}),
        (
            "llama3:factor=8",
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        ),
        ("base:5e5", {"rope_theta": 5e5}),
    ],
)
def test_patched_model_equals_transformers_own_scaled_model(spec, rope):
    patched, native = llama(), llama(**rope)
    with rw.patch(patched, spec):
        assert difference(logits(patched), logits(native)) < TOLERANCE
    assert difference(logits(patched), logits(native)) > 1e-3


@pytest.mark.parametrize("family", SOME)
def test_factor_one_is_the_untouched_model_to_the_bit(family):
    model = FAMILIES[family]()
    before = logits(model)
    for spec in ("none", "linear:1", "ntk:1", "ntk-mixed:1", "yarn:1", "mrrope:1", "critical-base:64"):
        with rw.patch(model, spec):
            assert torch.equal(logits(model), before), spec


@pytest.mark.parametrize("spec", ["yarn:4", "logn", "rerope:16"])
def test_a_hook_of_accelerate_on_the_rotary_module_stays(spec):
    model = llama()
    rotary = model.model.rotary_emb
    add_hook_to_module(rotary, AlignDevicesHook(io_same_device=True))
    hooked = rotary.forward
    with rw.patch(model, spec):
        logits(model)
    assert rotary.__dict__["forward"] is hooked


def test_generate_works_as_in_plain_transformers():
    model = llama()
    with rw.patch(model, "yarn:4"):
        cached = model.generate(IDS[:, :80], max_new_tokens=8, do_sample=False)
        recomputed = model.generate(IDS[:, :80], max_new_tokens=8, do_sample=False, use_cache=False)
    assert torch.equal(cached, recomputed)


def test_sliding_layers_keep_their_frequencies():
    model = FAMILIES["gemma3_text"]()
    rotary = model.model.rotary_emb
    local, full = rotary.sliding_attention_inv_freq, rotary.full_attention_inv_freq.clone()
    with rw.patch(model, "linear:2") as handle:
        assert rotary.sliding_attention_inv_freq is local
        assert torch.equal(rotary.full_attention_inv_freq, full / 2)
        assert "left alone: sliding_attention" in handle.describe()


def test_a_model_with_its_own_scaling_keeps_it_under_none_and_is_not_shortened():
    native = {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    model = llama(**native)
    before = logits(model)
    with rw.patch(model, "none"):
        assert torch.equal(logits(model), before)
    with pytest.raises(rw.ConfigError, match="fewer than its 64; factors count from 16, so take a factor of at least"):
        rw.patch(model, "linear:2")
    with rw.patch(model, "resonance"):  # on the model's own frequencies, not on plain ones
        wavelengths = 2 * torch.pi / model.model.rotary_emb.inv_freq.double()
        assert torch.allclose(wavelengths, wavelengths.round(), rtol=1e-6)
        assert model.model.rotary_emb.attention_scaling == pytest.approx(0.1 * torch.tensor(4.0).log().item() + 1)


def test_transformers_dynamic_update_does_not_overwrite_a_patch():
    model = llama(rope_type="dynamic", factor=2.0)
    with rw.patch(model, "ntk:8"):
        before = model.model.rotary_emb.inv_freq
        logits(model)  # 90 tokens, past max_position_embeddings
        assert model.model.rotary_emb.inv_freq is before


def test_describe_names_scaler_tier_reach_and_cost():
    with rw.patch(llama(), "yarn:4") as handle:
        text = handle.describe()
    for part in ("yarn:4", "static frequencies", "256 tokens (trained: 64)", "1.13863", "cost"):
        assert part in text


def test_a_second_patch_and_a_second_undo_are_refused():
    model = llama()
    handle = rw.patch(model, "linear:2")
    with pytest.raises(rw.PatchError, match="patched with linear:2 already"):
        rw.patch(model, "yarn:2")
    handle.undo()
    with pytest.raises(rw.PatchError, match="undone already"):
        handle.undo()


def test_a_patch_does_not_keep_the_model_alive():
    import weakref

    model = llama()
    rw.patch(model, "linear:2")
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


def test_refusals():
    gpt2 = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=97, n_positions=32, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(rw.UnsupportedModel, match=r"(?i)gpt2"):
        rw.patch(gpt2, "linear:2")
    foreign = llama()
    foreign.model.rotary_emb.inv_freq.mul_(0.5)
    with pytest.raises(rw.UnsupportedModel, match="not those of its config"):
        rw.patch(foreign, "linear:2")
    louder = llama()
    louder.model.rotary_emb.attention_scaling = 1.3
    with pytest.raises(rw.UnsupportedModel, match=r"factor on cos and sin, is 1\.3, and its config gives 1"):
        rw.patch(louder, "yarn:4")
    with pytest.raises(rw.ConfigError, match="below the trained length 64"):
        rw.patch(llama(), "critical-base:32")
    wrapper = torch.nn.Module()
    wrapper.inner, wrapper.config = llama(), llama().config
    for spec in ("yarn:4", "rerope:16", "logn"):
        with pytest.raises(rw.UnsupportedModel, match=r"Module has no device, so it is no model of transformers"):
            rw.patch(wrapper, spec)
    with pytest.raises(rw.ConfigError, match=r"not 'a/folder'; load it first with from_pretrained"):
        rw.patch("a/folder", "yarn:4")
    with pytest.raises(rw.UnsupportedModel, match="DataParallel has no config"):
        rw.patch(torch.nn.DataParallel(llama()), "linear:2")


@pytest.mark.parametrize("spec", ["yarn:4", "logn", "rerope:20|logn", "dynamic-ntk"])
@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_a_model_without_a_head_is_patched_like_the_one_with_it(family, spec):
    whole = FAMILIES[family]()
    with torch.inference_mode():
        with rw.patch(whole, spec):
            right = whole.model(input_ids=IDS).last_hidden_state
        before = whole.model(input_ids=IDS).last_hidden_state
        with rw.patch(whole.model, spec):
            assert torch.equal(whole.model(input_ids=IDS).last_hidden_state, right)
        assert torch.equal(whole.model(input_ids=IDS).last_hidden_state, before)


@pytest.mark.skipif("kimi_k25" not in CONFIG_MAPPING, reason="older transformers")
@pytest.mark.parametrize("spec", ["linear:4", "logn", "rerope:20"])
@pytest.mark.parametrize("rope", [DEFAULT, {**DEFAULT, "rope_type": "linear", "factor": 2.0}])
def test_a_tower_for_pictures_keeps_its_own_rotation(rope, spec):
    """Also if its frequencies equal those of the text model. If they differ, they are not compared."""
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CONFIG_MAPPING["kimi_k25"](
        text_config=FAMILIES["deepseek_v3"](rope_parameters=rope).config.to_dict(),
        vision_config={**vision, "projection_hidden_size": 32, "patch_size": 4},
    )
    model = AutoModelForImageTextToText.from_config(config).eval()
    rotary, places = model.model.vision_tower.rotary_emb, torch.arange(12).view(2, 6)
    before, cos = logits(model), rotary(torch.zeros(1), places)[0]
    with rw.patch(model, spec):
        assert torch.equal(rotary(torch.zeros(1), places)[0], cos)
        assert not torch.equal(logits(model), before)
    assert torch.equal(logits(model), before)


def test_a_model_cast_to_bfloat16_as_a_whole_is_patched_in_float32():
    model = llama().to(torch.bfloat16)
    with rw.patch(model, "linear:2"):
        assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert model.model.rotary_emb.inv_freq.dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["mistral-sliding", "phi3-sliding"])
@pytest.mark.parametrize("spec", ["logn", "temperature:1.3", "yarn:4|logn"])
def test_a_temperature_that_would_do_nothing_is_refused(family, spec):
    model = FAMILIES[family]()
    before = logits(model)
    with pytest.raises(rw.UnsupportedModel, match="sees a sliding window only"):
        rw.patch(model, spec)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("spec", ["ntk:2", "yarn:4|logn", "rerope:32"])
@pytest.mark.parametrize("cast", [lambda m: m.bfloat16(), lambda m: m.half().float(), lambda m: m.double()])
def test_a_cast_rounds_no_frequencies_of_a_scaler(spec, cast):
    """Under ntk:2 and 400 tokens, logits of a model cast to bfloat16 were 2.7 away from those of one loaded in it."""
    model, expected = llama(), llama()
    with rw.patch(model, spec):
        cast(model)
        actual = logits(model)
    frequencies = expected.model.rotary_emb.inv_freq
    cast(expected).model.rotary_emb.inv_freq = frequencies
    with rw.patch(expected, spec):
        assert torch.equal(actual, logits(expected))
    assert torch.equal(logits(model), logits(expected))


@pytest.mark.parametrize("spec", ["yarn:4", "logn", "rerope:32"])
def test_undo_after_a_cast_restores_the_frequencies_from_before(spec):
    model = llama()
    before = model.model.rotary_emb.inv_freq
    handle = rw.patch(model, spec)
    model.bfloat16()
    handle.undo()
    assert model.model.rotary_emb.inv_freq is before and before.dtype == torch.float32


def test_a_temperature_counts_the_dimensions_of_the_whole_head():
    """Half of Phi-3's head rotates here."""
    half = {"rope_parameters": {**DEFAULT, "partial_rotary_factor": 0.5}}
    site = primary_rotary(rotary_sites(FAMILIES["phi3"](**half)))
    assert site.configured.rope.dim == 8
    at = torch.tensor([0, 63, 100, 5000])
    assert torch.equal(site.logit_factor(InfoScale(), at), site.logit_factor(InfoScale(dim=16), at))
