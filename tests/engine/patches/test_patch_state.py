"""A patch changes the layers of a model only: not its config, a name in the process, or what a call left behind."""

import copy
import re
import warnings

import pytest
import torch
from families import FAMILIES
from patched import IDS, SPECS, read
from serving import difference
from transformers import AutoModel, AutoModelForCausalLM, Gemma3Config
from transformers.models.gemma3.modeling_gemma3 import Gemma3ForConditionalGeneration
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaModel

import ropewalk as rw


@pytest.fixture
def llama():
    return FAMILIES["llama"]()


# set_attn_implementation


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("inner", [False, True])
def test_another_attention_implementation_keeps_the_patch(family, spec, inner):
    model, other = FAMILIES[family](), FAMILIES[family]()
    other.set_attn_implementation("eager")
    untouched = read(other)
    with rw.patch(other, spec):
        expected = read(other)
    assert difference(expected, untouched) > 1e-3
    handle = rw.patch(model, spec)
    (model.model if inner else model).set_attn_implementation("eager")
    assert difference(read(model), expected) < 1e-6
    handle.undo()
    assert model.config._attn_implementation == "eager"
    assert torch.equal(read(model), untouched)


def test_an_implementation_written_into_the_config_keeps_the_patch(llama):
    with rw.patch(llama, "rerope:20|logn"):
        expected = read(llama)
        llama.config._attn_implementation = "eager"
        assert difference(read(llama), expected) < 1e-6


def test_our_name_alone_is_refused(llama):
    with rw.patch(llama, "logn"):
        name = llama.model.layers[0].self_attn.config._attn_implementation
    llama.set_attn_implementation(name)
    with pytest.raises(rw.PatchError, match="call set_attn_implementation with another one"):
        read(llama)


# The config


@pytest.mark.parametrize("spec", [*SPECS, "yarn:4"])
def test_the_config_of_a_patched_model_is_untouched(llama, spec, tmp_path):
    llama.save_pretrained(tmp_path)
    config, before = llama.config, copy.deepcopy(llama.config)
    untouched = read(llama)
    handle = rw.patch(llama, spec)
    patched = read(llama)
    assert llama.config is config
    assert config.to_dict() == before.to_dict()
    assert config._attn_implementation == before._attn_implementation
    others = [
        LlamaForCausalLM(config),
        AutoModelForCausalLM.from_config(config),
        LlamaForCausalLM.from_pretrained(tmp_path, config=config),
        LlamaForCausalLM.from_pretrained(tmp_path, config=llama.model.config),
        LlamaForCausalLM(copy.deepcopy(llama.model.layers[0].self_attn.config)),
        LlamaForCausalLM(copy.copy(llama.model.config)),
    ]
    for other in others:
        other.load_state_dict(llama.state_dict())
        assert torch.equal(read(other), untouched)
    handle.undo()
    for other in others:
        assert torch.equal(read(other), untouched)
        with rw.patch(other, spec):
            assert torch.equal(read(other), patched)


@pytest.mark.parametrize("build", [LlamaModel, AutoModel.from_config])
def test_a_model_built_from_the_config_of_a_layer_is_refused(llama, build):
    with rw.patch(llama, "logn"):
        with pytest.raises(rw.PatchError, match="use the config of the model itself"):
            build(llama.model.config)
        patched = read(llama)
        assert llama.model.config.to_dict() == llama.config.to_dict()
        assert repr(llama.model.config) == repr(llama.config)
    assert not torch.equal(read(llama), patched)


def test_layers_see_later_changes_of_the_config(llama):
    with rw.patch(llama, "logn"):
        llama.config.use_cache = False
        assert llama(input_ids=IDS).past_key_values is None
        assert llama.model.config.use_cache is False
    assert llama.model.config is llama.config


@pytest.mark.parametrize("spec", SPECS)
def test_a_model_with_a_text_config_in_it_is_patched_like_its_text_model(spec):
    text = FAMILIES["gemma3_text"]()
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=text.config.to_dict(), vision_config=vision | {"image_size": 28, "patch_size": 14}
    )
    whole = Gemma3ForConditionalGeneration(config).eval()
    whole.model.language_model.load_state_dict(text.model.state_dict())
    whole.lm_head.load_state_dict(text.lm_head.state_dict())
    before = config.to_dict()
    with rw.patch(text, spec), rw.patch(whole, spec):
        assert difference(read(whole), read(text)) < 1e-5
        assert config.to_dict() == before
        written = [model.generate(IDS, max_new_tokens=6, do_sample=False) for model in (whole, text)]
        assert torch.equal(*written)
    assert whole.model.config is config
    assert whole.model.language_model.config is config.text_config


@pytest.mark.parametrize("spec", ["yarn:4", "logn", "rerope:20", "yarn:2@0|yarn:4@1-"])
def test_save_pretrained_says_that_the_patch_is_not_saved(llama, spec, tmp_path):
    untouched = read(llama)
    handle = rw.patch(llama, spec)
    with pytest.warns(UserWarning, match=f"without the patch {re.escape(spec)}.*patched again") as given:
        llama.save_pretrained(tmp_path / "patched")
    assert ("ropewalk.export" in str(given[0].message)) == ("@" not in spec)
    assert given[0].filename == __file__
    assert torch.equal(read(LlamaForCausalLM.from_pretrained(tmp_path / "patched")), untouched)
    with pytest.warns(UserWarning, match="without the patch"):
        llama.model.save_pretrained(tmp_path / "base")
    handle.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        llama.save_pretrained(tmp_path / "undone")
    with rw.patch(llama, "yarn:4"), warnings.catch_warnings():
        warnings.simplefilter("error")
        rw.export(llama, tmp_path / "exported")


@pytest.fixture
def loaded(tiny_folder):
    return rw.load(tiny_folder, compile=False)


def test_the_model_under_a_loaded_one_names_its_scaler(loaded, tmp_path):
    loaded.rope = "yarn:2"
    with pytest.warns(UserWarning, match="without the patch yarn:2"):
        loaded.hf.save_pretrained(tmp_path / "scaled")
    loaded.rope = None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded.hf.save_pretrained(tmp_path / "plain")


@pytest.mark.parametrize("spec", ["yarn:2", "logn", "rerope:64"])
def test_a_loaded_model_and_the_one_under_it_are_not_patched_twice(loaded, spec):
    before = read(loaded.hf)
    loaded.rope = spec
    with pytest.raises(rw.PatchError, match=r"patched with .* already"):
        rw.patch(loaded.hf, "logn")
    loaded.rope = None
    handle = rw.patch(loaded.hf, spec)
    with pytest.raises(rw.PatchError, match="the model underneath is patched with"):
        loaded.rope = "logn"
    assert str(loaded.rope) == "none"
    handle.undo()
    loaded.rope = "logn"
    loaded.rope = None
    assert torch.equal(read(loaded.hf), before)
