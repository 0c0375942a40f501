"""A model in memory whose weights or modules differ from its config is not exported."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import ropewalk as rw

IDS = torch.arange(40)[None]
TARGETS = pytest.mark.parametrize("target", ["hf", "vllm", "llama.cpp"])


class Adapted(nn.Module):
    """A layer with an adapter: the layer, and a low-rank product that is added to its output."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer = layer
        self.lora_A = nn.Linear(layer.in_features, 4, bias=False)
        self.lora_B = nn.Linear(4, layer.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))

    def merged(self):
        with torch.no_grad():
            self.base_layer.weight += self.lora_B.weight @ self.lora_A.weight
        return self.base_layer


@pytest.fixture
def model(tiny_folder):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer(tiny_folder):
    return rw.load(tiny_folder).tokenizer


def logits(model):
    with torch.inference_mode():
        return model(IDS).logits


def attention(model):
    return model.model.layers[1].self_attn


def adapt(model):
    attention(model).q_proj = Adapted(attention(model).q_proj)


def adapt_embedding(model):
    rows = model.model.embed_tokens
    rows.base_layer = nn.Embedding(*rows.weight.shape)


def parametrize(model):
    nn.utils.parametrizations.weight_norm(attention(model).q_proj)


def parametrize_otherwise(model):
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    nn.utils.parametrize.register_parametrization(model.model.layers[0].mlp.up_proj, "weight", Doubled())


def normalize_the_older_way(model):
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(attention(model).q_proj)


def take_layers_out(model):
    model.model.layers = model.model.layers[:2]


def add_a_norm(model):
    attention(model).q_norm = nn.RMSNorm(32)


def replace_the_head(model):
    model.lm_head = nn.Linear(128, 1024, bias=False)


def add_biases(model):
    attention(model).v_proj.bias = nn.Parameter(torch.ones(64))


def widen(model):
    for name in ("gate_proj", "up_proj"):
        setattr(model.model.layers[0].mlp, name, nn.Linear(128, 416, bias=False))
    model.model.layers[0].mlp.down_proj = nn.Linear(416, 128, bias=False)


CHANGES = {
    adapt: r"holds an adapter at 'model\.layers\.1\.self_attn\.q_proj'.*merge_and_unload",
    adapt_embedding: r"holds an adapter at 'model\.embed_tokens'",
    parametrize: r"computes a weight of 'model\.layers\.1\.self_attn\.q_proj' from others.*remove_parametrizations",
    parametrize_otherwise: r"computes a weight of 'model\.layers\.0\.mlp\.up_proj' from others",
    normalize_the_older_way: r"'model\.layers\.1\.self_attn\.q_proj\.weight' has the shape none",
    take_layers_out: r"'model\.layers\.2\.input_layernorm\.weight' has the shape none, and in a new model .* \[128\]",
    add_a_norm: r"'model\.layers\.1\.self_attn\.q_norm\.weight' has the shape \[32\], and in a new model .* none",
    replace_the_head: r"ties the output matrix to the embedding .* 'lm_head\.weight' is a different matrix",
    add_biases: r"'model\.layers\.1\.self_attn\.v_proj\.bias' has the shape \[64\]",
    widen: r"'model\.layers\.0\.mlp\.down_proj\.weight' has the shape \[128, 416\], and in a new model .* \[128, 384\]",
}


@TARGETS
@pytest.mark.parametrize(("change", "words"), CHANGES.items(), ids=[change.__name__ for change in CHANGES])
def test_a_model_that_differs_from_its_config_is_refused(model, tokenizer, tmp_path, change, words, target):
    change(model)
    with pytest.raises(rw.UnsupportedModel, match=words):
        rw.export(model, tmp_path / "out", target=target, tokenizer=tokenizer)
    assert not (tmp_path / "out").exists()


def test_a_loaded_model_is_checked_too(tiny_folder, tmp_path):
    model = rw.load(tiny_folder, compile=False)
    adapt(model.hf)
    with pytest.raises(rw.UnsupportedModel, match="holds an adapter"):
        rw.export(model, tmp_path / "out")


def test_a_merged_adapter_is_exported(model, tmp_path):
    untouched = logits(model)
    adapt(model)
    expected = logits(model)
    attention(model).q_proj = attention(model).q_proj.merged()
    rw.export(model, tmp_path / "out")
    back = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32))
    assert (back - expected).abs().max() < 1e-4 < (expected - untouched).abs().max()


def test_a_parametrization_that_was_removed_is_exported(model, tmp_path):
    expected = logits(model)
    parametrize(model)
    nn.utils.parametrize.remove_parametrizations(attention(model).q_proj, "weight")
    rw.export(model, tmp_path / "out")
    assert (logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")) - expected).abs().max() < 1e-4


class Wrapper(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.inner = model


class AdapterWrapper(Wrapper):
    def merge_and_unload(self):
        return self.inner


@pytest.mark.parametrize(
    ("kind", "words"), [(Wrapper, "transformers model inside it"), (AdapterWrapper, "merge the adapter")]
)
def test_a_wrapper_is_named(model, tmp_path, kind, words):
    with pytest.raises(rw.UnsupportedModel, match=rf"of type {kind.__name__} cannot be exported.*{words}"):
        rw.export(kind(model), tmp_path / "out")


def test_peft(model, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(copy.deepcopy(model), config)
    for adapted in (wrapped, wrapped.base_model.model):
        with pytest.raises(rw.UnsupportedModel, match="merge_and_unload"):
            rw.export(adapted, tmp_path / "out")
    expected = logits(wrapped)
    rw.export(wrapped.merge_and_unload(), tmp_path / "out")
    assert (logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")) - expected).abs().max() < 1e-4
