"""Models with a softmax scale from `rope_parameters`, compared with models of transformers of the same config."""

import pytest
import torch
from families import DEFAULT, FAMILIES
from serving import IDS, TOLERANCE, difference, logits
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import ropewalk as rw
from ropewalk.engine.patches.derived import derives_numbers

YARN = {**DEFAULT, "rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 16}
OWN = {
    "plain": DEFAULT,
    "yarn": YARN,
    "both": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    "all_dim": {**YARN, "mscale_all_dim": 1.0},
    "unequal": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3},
    "given": {**YARN, "mscale_all_dim": 1.3, "attention_factor": 1.1},
}
LATENT = ("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "longcat_flash", "minicpm3", "youtu", "bailing_hybrid")
SPECS = ("yarn:80", "yarn:80,mscale=1,mscale_all_dim=1", "yarn:80,mscale_all_dim=0.8", "yarn:80,attention_factor=1.2")


def latent(config_rope: str, family: str = "deepseek_v3") -> torch.nn.Module:
    return FAMILIES[family](rope_parameters=OWN[config_rope])


def written(spec: str, trained: int) -> dict:
    """The `rope_parameters` that a user would write for `spec` by hand."""
    _, *others = spec.split(",")
    extra = {key: float(value) for key, _, value in (part.partition("=") for part in others)}
    return {**YARN, "factor": 80.0, "original_max_position_embeddings": trained, **extra}


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("config_rope", ["plain", "both", "all_dim"])
def test_a_patch_equals_a_model_with_that_config(config_rope, spec):
    model = latent(config_rope)
    before = logits(model)
    native = FAMILIES["deepseek_v3"](rope_parameters=written(spec, 64 if config_rope == "plain" else 16))
    with rw.patch(model, spec):
        assert difference(logits(model), logits(native)) < TOLERANCE
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("family", LATENT)
def test_every_latent_attention_is_found_by_building_it(family):
    spec = "yarn:80,mscale=1,mscale_all_dim=1"
    model, native = latent("plain", family), FAMILIES[family](rope_parameters=written(spec, 64))
    assert derives_numbers(type(model), model.config)
    with rw.patch(model, spec):
        assert difference(logits(model), logits(native)) < TOLERANCE


@pytest.mark.parametrize("config_rope", OWN)
@pytest.mark.parametrize("target", ["hf", "vllm", "sglang"])
def test_an_untouched_model_is_exported_as_it_is(config_rope, target, tmp_path):
    model = latent(config_rope)
    rw.export(model, tmp_path / "out", target=target)
    assert difference(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model)) < TOLERANCE


@pytest.mark.parametrize("spec", [*SPECS, "ntk:80", "linear:80"])
@pytest.mark.parametrize("target", ["hf", "vllm"])
def test_an_export_equals_the_patch(spec, target, tmp_path):
    if (spec, target) == ("linear:80", "vllm"):
        pytest.skip("refused, as another test has it")
    model = latent("both")
    model.save_pretrained(tmp_path / "source")
    rw.export(tmp_path / "source", tmp_path / "out", rope=spec, target=target)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with rw.patch(model, spec):
        assert difference(logits(exported), logits(model)) < TOLERANCE


@pytest.mark.parametrize(
    ("spec", "target", "words"),
    [
        ("linear:80", "vllm", "takes a softmax scale from rope_parameters"),
        ("ntk-mixed:80", "sglang", "takes a softmax scale from rope_parameters"),
        ("yarn:80,truncate=false", "vllm", "with truncated ends"),
        ("yarn:80,attention_factor=0.9", "vllm", "and 0.9 needs an mscale that is not above 0"),
        ("resonance", "hf", r"self_attn.scaling = 0.25 .*, and 0.46"),
    ],
)
def test_an_export_that_an_engine_would_misread_is_refused(spec, target, words, tmp_path):
    with pytest.raises(rw.RopewalkError, match=words):
        rw.export(latent("both"), tmp_path / "out", rope=spec, target=target)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("other", ["rerope:32", "logn", "temperature:1.1"])
def test_other_facets_work_over_the_new_scale(other):
    spec = "yarn:80,mscale=1,mscale_all_dim=1"
    model, native = latent("all_dim"), FAMILIES["deepseek_v3"](rope_parameters=written(spec, 16))
    before = logits(model)
    with rw.patch(native, other):
        right = logits(native)
    with rw.patch(model, f"{spec}|{other}"):
        assert difference(logits(model), right) < 10 * TOLERANCE
    assert torch.equal(logits(model), before)


def test_frequencies_on_a_grid_keep_the_models_own_scale():
    model = latent("both")
    scale = model.model.layers[0].self_attn.scaling
    with rw.patch(model, "resonance"):
        assert model.model.layers[0].self_attn.scaling == scale


def test_a_scale_that_was_changed_by_hand_is_not_overwritten():
    model = latent("both")
    model.model.layers[1].self_attn.scaling = 0.3
    with pytest.raises(rw.UnsupportedModel, match=r"layers\.1\.self_attn\.scaling is 0\.3"):
        rw.patch(model, "yarn:80")


class UnknownFamily(LlamaForCausalLM):
    """A family that transformers does not have, with its own rule."""

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.self_attn.scaling *= config.rope_parameters.get("attention_factor", 1.0) ** 3


def test_a_rule_of_an_unknown_family_is_followed():
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    sizes |= {"num_hidden_layers": 2, "max_position_embeddings": 64}
    rope = {**YARN, "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.5}
    native = UnknownFamily(LlamaConfig(**sizes, rope_parameters=rope)).eval()
    model = UnknownFamily(LlamaConfig(**sizes)).eval()
    model.load_state_dict(native.state_dict())
    with torch.no_grad(), rw.patch(model, "yarn:4,attention_factor=1.5"):
        assert model.model.layers[0].self_attn.scaling == pytest.approx(native.model.layers[0].self_attn.scaling)
        assert difference(model(IDS).logits, native(IDS).logits) < TOLERANCE
