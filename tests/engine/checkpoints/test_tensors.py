"""Every tensor of a checkpoint is used once, with its shape. Otherwise an error names a tensor."""

import json

import pytest
import torch
from checkpoint_edits import edit, edit_weights, save_with_tokenizer
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import ropewalk as rw

GREEDY = rw.SamplingParams(max_new_tokens=4, temperature=0)


def test_a_missing_tensor_is_named(folder):
    def rename(weights):
        weights["unheard.of"] = weights.pop("model.layers.1.mlp.up_proj.weight")

    edit_weights(folder, rename)
    with pytest.raises(rw.AssetError, match=r"1 tensors .*'model\.layers\.1\.mlp\.up_proj\.weight' first"):
        rw.load(folder)


HIDDEN, INNER = 128, 384  # of the tiny model


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.self_attn.q_proj.bias",
        "model.layers.1.self_attn.k_proj.bias",
        "model.layers.1.mlp.up_proj.bias",
        "model.layers.1.self_attn.k_norm.weight",
        "model.layers.1.self_attn.q_proj.lora_A.weight",
        "base_model.model.model.layers.1.self_attn.q_proj.lora_B.default.weight",
        "model.layers.1.self_attn.q_proj.weight_scale",
        "model.layers.4.input_layernorm.weight",
        "model.layers.1.post_feedforward_layernorm.weight",
        "model.embed_positions.weight",
        "lm_head.bias",
        "score.weight",
        "v_head.summary.weight",
    ],
)
def test_a_tensor_that_the_model_does_not_use_is_named(folder, name):
    edit_weights(folder, lambda weights: weights.update({name: torch.ones(HIDDEN)}))
    with pytest.raises(rw.AssetError, match=rf"does not use 1 tensors of its files, '{name}' first"):
        rw.load(folder)


def test_biases_that_the_config_has_are_used(folder, tiny_folder):
    """The config may also be corrected; then the logits are those of transformers."""
    edit(folder / "config.json", attention_bias=True)
    biases = {f"model.layers.{n}.self_attn.{kind}_proj.bias": kind for n in range(4) for kind in "qkvo"}
    torch.manual_seed(0)
    edit_weights(
        folder,
        lambda weights: weights.update(
            {name: torch.randn(weights[name.replace("bias", "weight")].shape[0]) for name in biases}
        ),
    )
    score = rw.load(folder, dtype="float32").score("import os\n")
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([score.token_ids])
    with torch.inference_mode():
        logprobs = reference(ids).logits[0, :-1].log_softmax(-1)
    expected = logprobs.gather(-1, ids[0, 1:, None])[:, 0]
    assert (score.logprobs - expected).abs().max() < 1e-4
    assert (rw.load(tiny_folder, dtype="float32").score("import os\n").logprobs - expected).abs().max() > 0.1


def test_fewer_layers_in_the_config_than_in_the_files(folder):
    edit(folder / "config.json", num_hidden_layers=3)
    with pytest.raises(
        rw.AssetError, match=r"9 tensors of its files, 'model\.layers\.3\.input_layernorm\.weight' first"
    ):
        rw.load(folder)


def test_a_layer_that_transformers_skips_by_its_number(tiny_folder, tmp_path):
    """The class of GLM-4.5 drops layer 46 silently: in one size it predicts further tokens. Here it matters."""
    config = Glm4MoeConfig(
        vocab_size=1024, hidden_size=16, intermediate_size=16, num_hidden_layers=47, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256, first_k_dense_replace=47, bos_token_id=0,
        eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    save_with_tokenizer(Glm4MoeForCausalLM(config), tmp_path, tiny_folder)
    assert rw.load(tmp_path).score("import os\n").token_ids
    content = json.loads((tmp_path / "config.json").read_text())
    per_layer = {name: value[:46] for name, value in content.items() if isinstance(value, list) and len(value) == 47}
    edit(tmp_path / "config.json", num_hidden_layers=46, **per_layer)
    with pytest.raises(
        rw.AssetError, match=r"tensors of its files, 'model\.layers\.46\.input_layernorm\.weight' first"
    ):
        rw.load(tmp_path)
    edit_weights(tmp_path, lambda weights: weights.update({"model.layers.46.eh_proj.weight": torch.ones(16, 32)}))
    assert rw.load(tmp_path).score("import os\n").token_ids


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.0.self_attn.rotary_emb.inv_freq", (16,)),
        ("rotary_emb.inv_freq", (16,)),
        ("model.layers.0.self_attn.rotary_emb.cos_cached", (1, 1, 256, 32)),
        ("model.layers.0.self_attn.masked_bias", ()),
        ("model.layers.0.attn.bias", (1, 1, 256, 256)),
        ("mtp.layers.0.mlp.up_proj.weight", (INNER, HIDDEN)),
        ("model.mtp_layers.0.mlp.up_proj.weight", (INNER, HIDDEN)),
    ],
)
def test_tensors_on_which_no_logit_depends_may_be_stored(folder, tiny_folder, name, shape):
    edit_weights(folder, lambda weights: weights.update({name: torch.ones(shape)}))
    assert torch.equal(
        rw.load(folder).score("import os\n").logprobs, rw.load(tiny_folder).score("import os\n").logprobs
    )


def test_a_layer_that_predicts_further_tokens_may_be_stored(folder):
    """DeepSeek stores it after the last layer. A layer without its projection belongs to the model."""

    def add(weights):
        for name in [name for name in weights if ".layers.3." in name]:
            weights[name.replace("layers.3", "layers.4")] = weights[name].clone()
        weights["model.layers.4.eh_proj.weight"] = torch.ones(HIDDEN, 2 * HIDDEN)

    edit_weights(folder, add)
    assert rw.load(folder).generate("import ", GREEDY).token_ids
    edit_weights(folder, lambda weights: weights.pop("model.layers.4.eh_proj.weight"))
    with pytest.raises(rw.AssetError, match=r"9 tensors of its files"):
        rw.load(folder)


def test_a_tensor_of_another_shape_is_named_with_both(folder):
    edit(folder / "config.json", intermediate_size=INNER - 32)
    with pytest.raises(
        rw.AssetError,
        match=rf"'model\.layers\.0\.mlp\.down_proj\.weight' has the shape \[{HIDDEN}, {INNER}\], and its config",
    ):
        rw.load(folder)


def test_an_output_matrix_beside_a_tied_embedding(folder, tiny_folder):
    """A copy of the embedding is accepted. Of a different matrix, some programs use it and some do not."""
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    edit_weights(folder, lambda weights: weights.update({"lm_head.weight": embedding.clone()}))
    expected = rw.load(tiny_folder).score("import os\n").logprobs
    assert torch.equal(rw.load(folder).score("import os\n").logprobs, expected)
    edit_weights(folder, lambda weights: weights.update({"lm_head.weight": embedding.flip(0).contiguous()}))
    with pytest.raises(
        rw.AssetError, match=r"ties the output matrix.*different output matrix, 'lm_head\.weight'.*programs disagree"
    ):
        rw.load(folder)
    edit(folder / "config.json", tie_word_embeddings=False)
    assert not torch.equal(rw.load(folder).score("import os\n").logprobs, expected)


def test_two_tensors_for_one_weight(folder):
    for other in ("model.model.norm.weight", "norm.weight"):
        edit_weights(folder, lambda weights, other=other: weights.update({other: torch.ones(HIDDEN)}))
        with pytest.raises(rw.AssetError, match=r"its tensors '.*' and '.*' are the same weight"):
            rw.load(folder)
        edit_weights(folder, lambda weights, other=other: weights.pop(other))


@pytest.fixture
def experts(tiny_folder, tmp_path):
    """A mixture of experts with one stored tensor for each expert; transformers stacks them."""
    config = MixtralConfig(
        vocab_size=1024, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=256, bos_token_id=0, eos_token_id=0,
        pad_token_id=0,
    )  # fmt: skip
    save_with_tokenizer(MixtralForCausalLM(config), tmp_path, tiny_folder)
    assert rw.load(tmp_path).score("import os\n").token_ids
    return tmp_path


@pytest.mark.parametrize("numbers", [(0, 1, 2, 6), (1, 2, 3, 4), (0, 1, 2, 10)])
def test_experts_whose_numbers_have_gaps(experts, numbers):
    """transformers stacks them in the order of their numbers, also if numbers are missing. The router has four rows."""

    def renumber(weights):
        for name in sorted(name for name in weights if ".experts." in name):
            head, _, rest = name.partition(".experts.")
            number, _, end = rest.partition(".")
            weights[f"{head}.experts.new{numbers[int(number)]}.{end}"] = weights.pop(name)
        for name in [name for name in weights if ".experts.new" in name]:
            weights[name.replace(".new", ".")] = weights.pop(name)

    edit_weights(experts, renumber)
    with pytest.raises(rw.AssetError, match=rf"have the numbers {', '.join(map(str, numbers))}, but 4 tensors are"):
        rw.load(experts)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.0.mlp.gate.weight", (4, 16)),  # block_sparse_moe.gate in the files
        ("model.layers.0.mlp.experts.gate_up_proj", (4, 32, 16)),
        ("model.layers.0.mlp.experts.down_proj", (4, 16, 16)),
        ("layers.0.block_sparse_moe.experts.2.w1.weight", (16, 16)),
    ],
)
def test_two_tensors_for_one_weight_under_the_names_of_transformers(experts, name, shape):
    """transformers dropped some of them, and raised an AttributeError for others."""
    edit_weights(experts, lambda weights: weights.update({name: torch.ones(shape)}))
    with pytest.raises(rw.AssetError, match=r"are the same weight; remove one|each once"):
        rw.load(experts)


def test_an_output_matrix_under_its_older_name(tiny_folder, tmp_path):
    """Pythia's `embed_out`, together with `lm_head`, and together with a tied embedding."""
    config = GPTNeoXConfig(
        vocab_size=1024, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=256, bos_token_id=0, eos_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    save_with_tokenizer(GPTNeoXForCausalLM(config), tmp_path, tiny_folder)
    assert rw.load(tmp_path).score("import os\n").token_ids
    edit(tmp_path / "config.json", tie_word_embeddings=True)
    with pytest.raises(rw.AssetError, match=r"ties the output matrix.*different output matrix, 'embed_out\.weight'"):
        rw.load(tmp_path)
    edit(tmp_path / "config.json", tie_word_embeddings=False)
    edit_weights(tmp_path, lambda weights: weights.update({"lm_head.weight": torch.ones(1024, 16)}))
    with pytest.raises(rw.AssetError, match=r"'embed_out\.weight' and 'lm_head\.weight' are the same weight"):
        rw.load(tmp_path)


@pytest.mark.parametrize(("shape", "is_mask"), [((1, 1, 256, 256), True), ((16,), False), ((1, 2, 256, 256), False)])
def test_a_bias_that_has_the_name_of_a_mask(tiny_folder, tmp_path, shape, is_mask):
    """transformers' GPT-NeoX ignores `attention.bias`, which is the causal mask in old checkpoints."""
    config = GPTNeoXConfig(
        vocab_size=1024, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=256, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    save_with_tokenizer(GPTNeoXForCausalLM(config), tmp_path, tiny_folder)
    name = "gpt_neox.layers.0.attention.bias"
    edit_weights(tmp_path, lambda weights: weights.update({name: torch.ones(shape)}))
    if is_mask:
        assert rw.load(tmp_path).score("import os\n").token_ids
        return
    with pytest.raises(rw.AssetError, match=r"does not use 1 tensors of its files, 'gpt_neox\.layers\.0\.attention"):
        rw.load(tmp_path)


def test_one_tensor_in_two_files(folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    save_file({"model.norm.weight": torch.ones(HIDDEN)}, folder / "two.safetensors", {"format": "pt"})
    index = {name: "two" if name == "model.norm.weight" else "one" for name in weights}
    content = {"metadata": {}, "weight_map": {name: f"{file}.safetensors" for name, file in index.items()}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    with pytest.raises(rw.AssetError, match=r"two\.safetensors: its tensor 'model\.norm\.weight' is in another file"):
        rw.load(folder)
