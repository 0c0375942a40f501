"""A model in memory that computes something else than its config and weights say is not exported.

Whatever is exported gives the logits of the model in memory when stock transformers reads it.
"""

import copy
import types
import warnings

import pytest
import torch
from families import FAMILIES, YARN
from model_changes import (
    CHANGES,
    change_a_scale,
    change_the_frequencies,
    edit_the_epsilon,
    hook_a_module,
    layer,
    replace_a_forward,
    replace_an_activation,
)
from transformers import AutoModelForCausalLM, LlamaModel

import ropewalk as rw

IDS = torch.arange(3, 43)[None]


TARGETS = ["hf", "vllm", "sglang", "llama.cpp", "ollama"]


@pytest.fixture
def model(tiny_folder):
    return AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(tiny_folder):
    return rw.load(tiny_folder).tokenizer


def logits(model):
    with torch.inference_mode():
        return model(IDS % model.config.get_text_config().vocab_size).logits.float()


@pytest.mark.parametrize("target", ["hf", "llama.cpp"])
@pytest.mark.parametrize(("change", "words"), CHANGES.items(), ids=[change.__name__ for change in CHANGES])
def test_a_change_that_a_file_cannot_hold_is_refused(model, tokenizer, tmp_path, change, words, target):
    change(model)
    with pytest.raises(rw.UnsupportedModel, match=words):
        rw.export(model, tmp_path / "out", target=target, tokenizer=tokenizer)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", TARGETS)
def test_for_every_target(model, tokenizer, tmp_path, target):
    replace_a_forward(model)
    with pytest.raises(rw.UnsupportedModel, match="was replaced"):
        rw.export(model, tmp_path / "out", target=target, tokenizer=tokenizer)


@pytest.mark.parametrize("change", [hook_a_module, change_a_scale, change_the_frequencies, replace_an_activation])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_too(model, tmp_path, change, dtype):
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    rw.export(model, tmp_path / "untouched")
    change(model)
    with pytest.raises(rw.UnsupportedModel):
        rw.export(model, tmp_path / "out")


@pytest.mark.parametrize("spec", ["yarn:4", "dynamic-ntk:4", "rerope:64|logn", "none"])
@pytest.mark.parametrize("change", [hook_a_module, change_a_scale, edit_the_epsilon, replace_a_forward])
def test_under_a_patch_too(model, tmp_path, spec, change):
    change(model)
    with rw.patch(model, spec), pytest.raises(rw.UnsupportedModel):
        rw.export(model, tmp_path / "out", rope="yarn:4")


@pytest.mark.parametrize(
    ("spec", "length"), [("yarn:4", None), ("dynamic-ntk:4", None), ("dynamic-ntk:4", "4x"), ("rerope:64|logn", None)]
)
def test_a_patch_is_not_a_change(model, tmp_path, spec, length):
    with rw.patch(model, spec, length=length):
        before = logits(model)
        rw.export(model, tmp_path / "out", rope="yarn:4")
        assert torch.equal(logits(model), before)
    with rw.patch(model, "yarn:4"):
        expected = logits(model)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert (logits(back) - expected).abs().max() < 1e-4


def test_frequencies_changed_behind_a_patch(model, tmp_path):
    with rw.patch(model, "yarn:4"):
        model.model.rotary_emb.inv_freq.mul_(0.5)
        with pytest.raises(rw.UnsupportedModel, match="inv_freq"):
            rw.export(model, tmp_path / "out")


@pytest.mark.parametrize("compile", [True, False])
@pytest.mark.parametrize("spec", ["none", "yarn:4", "dynamic-yarn", "auto"])
def test_a_model_that_load_returned(tiny_folder, tmp_path, compile, spec):
    loaded = rw.load(tiny_folder, rope=spec, compile=compile)
    ids = list(range(3, 300))
    before = loaded.score_ids(ids)
    rw.export(loaded, tmp_path / "out", rope="yarn:2", length="2x")
    assert torch.equal(torch.as_tensor(loaded.score_ids(ids)), torch.as_tensor(before))
    hook_a_module(loaded.hf)
    with pytest.raises(rw.UnsupportedModel, match="has a forward hook"):
        rw.export(loaded, tmp_path / "other", rope="yarn:2")


def test_the_model_is_not_changed(model, tmp_path):
    model.train()
    model.model.layers[0].eval()
    model.config.attention_dropout = 0.5
    layer(model).self_attn.attention_dropout = 0.5
    modes = [module.training for module in model.modules()]
    tensors = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    wanted = [weight.requires_grad for weight in model.parameters()]
    torch.manual_seed(7)
    drawn = torch.rand(1)
    torch.manual_seed(7)
    rw.export(model, tmp_path / "out")
    assert torch.equal(torch.rand(1), drawn)
    assert [module.training for module in model.modules()] == modes
    assert {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()} == tensors
    assert [weight.requires_grad for weight in model.parameters()] == wanted


def test_changes_without_effect_on_logits_are_exported(model, tmp_path):
    seen = []
    layer(model).register_forward_hook(lambda _module, _args, out: seen.append(out))
    layer(model).mlp.forward = types.MethodType(type(layer(model).mlp).forward, layer(model).mlp)
    model.config.pad_token_id = 2
    model.config.use_cache = False
    model.config.max_position_embeddings *= 2
    model.config.attention_dropout = 0.1
    model.gradient_checkpointing_enable()
    rw.export(model, tmp_path / "out")
    assert seen


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 8,
    "long_factor": [3.0] * 8,
    "original_max_position_embeddings": 64,
    "factor": 4.0,
}


@pytest.mark.parametrize("parameters", [DYNAMIC, LONGROPE], ids=["dynamic", "longrope"])
def test_a_model_that_has_read_a_long_text(tmp_path, parameters):
    hf = FAMILIES["llama"](rope_parameters=parameters)
    expected = logits(hf)
    with torch.inference_mode():
        hf(torch.arange(200)[None] % 97)
    grown = hf.model.rotary_emb.inv_freq.clone()
    rw.export(hf, tmp_path / "out")
    assert torch.equal(hf.model.rotary_emb.inv_freq, grown)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert (logits(back) - expected).abs().max() < 1e-4 * expected.abs().max()
    hf.model.rotary_emb.original_inv_freq.mul_(0.5)
    with pytest.raises(rw.UnsupportedModel, match="inv_freq"):
        rw.export(hf, tmp_path / "other")


@pytest.mark.parametrize("family", ["deepseek_v3", "mixtral", "gemma3_text", "qwen3_moe", "gpt_oss", "phi3"])
def test_other_families(tmp_path, family):
    hf = FAMILIES[family]()
    expected = logits(hf)
    rw.export(hf, tmp_path / "out")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert (logits(back) - expected).abs().max() < 1e-4 * expected.abs().max()
    norm = next(module for name, module in hf.named_modules() if name.endswith("input_layernorm"))
    norm.register_forward_hook(lambda _module, _args, out: out.roll(1, -1))
    with pytest.raises(rw.UnsupportedModel, match="has a forward hook"):
        rw.export(hf, tmp_path / "other")


def test_a_derived_softmax_scale(tmp_path):
    hf = FAMILIES["deepseek_v3"](rope_parameters={**YARN, "mscale": 1.0, "mscale_all_dim": 1.0})
    rw.export(hf, tmp_path / "out")
    hf.model.layers[1].self_attn.scaling *= 1.1
    with pytest.raises(rw.UnsupportedModel, match=r"layers\.1\.self_attn\.scaling"):
        rw.export(hf, tmp_path / "other")


def test_a_window_wider_than_the_text(tmp_path):
    hf = FAMILIES["gemma2"]()
    hf.config.sliding_window = 4096
    with pytest.raises(rw.UnsupportedModel, match="sliding_window is 16, and in a new model of the config 4096"):
        rw.export(hf, tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_frequencies_that_a_cast_has_rounded(model, tmp_path, dtype):
    model.to(dtype)
    with pytest.warns(UserWarning, match=rf"frequencies of this LlamaForCausalLM were rounded to {dtype}"):
        rw.export(model, tmp_path / "out")
    model.model.rotary_emb.inv_freq.mul_(0.5)
    with pytest.raises(rw.UnsupportedModel, match="inv_freq"), warnings.catch_warnings(action="ignore"):
        rw.export(model, tmp_path / "other")


def test_offloaded_weights(model, tiny_folder, tmp_path):
    expected = logits(model)
    device_map = {
        "model.embed_tokens": "cpu",
        "model.layers.0": "disk",
        "model.layers.1": "cpu",
        "model.layers.2": "disk",
    }
    device_map |= {f"model.layers.{n}": "cpu" for n in range(3, model.config.num_hidden_layers)}
    device_map |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    hf = AutoModelForCausalLM.from_pretrained(
        tiny_folder, dtype=torch.float32, device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert any(weight.is_meta for weight in hf.parameters())
    rw.export(hf, tmp_path / "out")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert (logits(back) - expected).abs().max() < 1e-4
    assert (logits(hf) - expected).abs().max() < 1e-4
    inner = layer(hf).mlp.forward
    layer(hf).mlp.forward = lambda x: 2 * inner(x)
    with pytest.raises(rw.UnsupportedModel, match="logits differ"):
        rw.export(hf, tmp_path / "other")


def test_weights_on_the_meta_device(tiny_folder, tmp_path):
    config = rw.load(tiny_folder).hf.config
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(config)
    with pytest.raises(rw.UnsupportedModel, match="meta device"):
        rw.export(hf, tmp_path / "out")


def test_a_forward_that_was_replaced_in_its_class_gives_a_warning(model, tmp_path, monkeypatch):
    original = type(layer(model).mlp).forward
    monkeypatch.setattr(type(layer(model).mlp), "forward", lambda self, x: 2 * original(self, x))
    with pytest.warns(UserWarning, match=r"forward of the class LlamaMLP was replaced by one of .*test_rebuilt"):
        rw.export(model, tmp_path / "out")


def test_quantized_weights_give_a_warning(model, tmp_path):
    model.hf_quantizer = None
    with warnings.catch_warnings(action="error"):
        rw.export(model, tmp_path / "out")
    # only the attribute that a quantizer sets is needed here
    from ropewalk.engine.exports.unmodified import check_unmodified

    model.hf_quantizer = object()
    with pytest.warns(UserWarning, match="is quantized, so its logits were not compared"):
        check_unmodified(model)
    change_a_scale(model)
    with pytest.raises(rw.UnsupportedModel, match="scaling"):
        check_unmodified(model)


def test_a_model_without_its_head_is_not_written_to_gguf(tiny_folder, tokenizer, tmp_path):
    body = LlamaModel.from_pretrained(tiny_folder)
    with pytest.raises(rw.UnsupportedModel, match="is a LlamaModel; only LlamaForCausalLM is written to GGUF"):
        rw.export(body, tmp_path / "out.gguf", target="llama.cpp", tokenizer=tokenizer)


def test_a_layer_that_was_copied(model, tmp_path):
    model.model.layers[1] = copy.deepcopy(model.model.layers[0])
    layer(model).self_attn.layer_idx = 1
    expected = logits(model)
    rw.export(model, tmp_path / "out")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert (logits(back) - expected).abs().max() < 1e-4
