"""Checkpoints that nobody vouches for: only data is read, nothing of theirs runs, and what is damaged is named."""

import json
import shutil

import pytest
import torch
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
from ropewalk.engine.chat_header import chat_headers

GREEDY = rw.SamplingParams(max_new_tokens=4, temperature=0)


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """A copy of the tiny model to do harm to."""
    return shutil.copytree(tiny_folder, tmp_path / "model")


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


# Code


@pytest.fixture
def evil(folder, monkeypatch):
    """Code beside the weights that leaves a mark when it runs, and a user whose piped text begins with `y`."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    mark = folder / "mark"
    code = f"open({str(mark)!r}, 'w')\nfrom transformers import LlamaForCausalLM as M, LlamaConfig as C\n"
    (folder / "evil.py").write_text(code + "from transformers import PreTrainedTokenizerFast as T\n")
    yield folder
    assert not mark.exists()


def test_code_of_a_config_never_runs(evil):
    edit(evil / "config.json", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})
    assert rw.load(evil).generate("import ", GREEDY).token_ids  # a family that transformers has
    edit(evil / "config.json", model_type="evil", architectures=["M"])
    with pytest.raises(rw.AssetError, match="needs its own code, which ropewalk never runs"):
        rw.load(evil)


def test_code_of_a_tokenizer_never_runs(evil):
    edit(evil / "tokenizer_config.json", tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.T", "evil.T"]})
    with pytest.raises(rw.AssetError, match="needs its own code, which ropewalk never runs"):
        rw.load(evil)


class Pickled:
    """Runs code where it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


def test_pickled_weights_are_refused_with_the_way_to_convert_them(evil):
    (evil / "model.safetensors").unlink()
    torch.save({"x": Pickled(evil / "mark")}, evil / "pytorch_model.bin")
    with pytest.raises(rw.AssetError, match=r"pickled \(pytorch_model\.bin\).*save_pretrained\(OUT\)"):
        rw.load(evil)


def test_an_index_cannot_name_a_pickle_or_a_file_elsewhere(evil):
    torch.save({"x": Pickled(evil / "mark")}, evil / "evil.bin")
    names = list(load_file(evil / "model.safetensors"))
    (evil / "model.safetensors").rename(evil.parent / "part.safetensors")
    index = evil / "model.safetensors.index.json"
    for file in ("evil.bin", "../part.safetensors", str(evil.parent / "part.safetensors"), 1, None):
        index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, file)}))
        with pytest.raises(rw.AssetError, match=r"is no \.safetensors file of its folder"):
            rw.load(evil)
    (evil.parent / "part.safetensors").rename(evil / "part.safetensors")
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "part.safetensors")}))
    assert rw.load(evil).generate("import ", GREEDY).token_ids


def test_an_adapter_does_not_lead_to_another_model(folder):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "somewhere/else", "peft_type": "LORA"}')
    with pytest.raises(rw.AssetError, match="holds an adapter; merge it"):
        rw.load(folder)
    (folder / "adapter_config.json").rename(folder / "adapter_model.safetensors")
    with pytest.raises(rw.AssetError, match=r"holds an adapter; .* or remove adapter_model\.safetensors"):
        rw.load(folder)


HOSTILE = {
    "reaches for Python": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "never ends": "{% for i in range(99999) %}" * 5 + "{% endfor %}" * 5,
    "fills the memory": "{% set x = namespace(s='x') %}{% for i in range(60) %}{% set x.s = x.s + x.s %}{% endfor %}",
    "is no template": "{% for %}",
    "is deep": "{{" + "(" * 50_000,
}


@pytest.mark.parametrize("template", HOSTILE.values(), ids=HOSTILE)
def test_a_chat_template_is_never_run(folder, template):
    edit(folder / "tokenizer_config.json", chat_template=template)
    assert rw.load(folder).generate("import nump", GREEDY).token_ids


CHATML = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
NESTED = "{%- if add_generation_prompt %}\n{{- 'a:\\n' }}{%- if think %}{{- '<think>' }}{%- endif %}\n{%- endif %}"


@pytest.mark.parametrize(
    ("template", "headers"),
    [
        (CHATML, ("<|im_start|>assistant\n",)),
        (NESTED, ("a:\n",)),
        ("{% if loop.last and add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}", ("<|assistant|>",)),
        ("{% if add_generation_prompt %}{{ '[' ~ role ~ ']' + ' says: ' }}{% endif %}", ("] says: ",)),
        ("{% generation %}x{% endgeneration %}{% if add_generation_prompt %}y{% endif %}", ("y",)),
        ("{% if not add_generation_prompt %}x{% endif %}", ()),
        ("{% if add_generation_prompt %}{{ role }}{% endif %}", ()),
    ],
)
def test_what_a_template_writes_before_an_answer(template, headers):
    assert chat_headers(template) == headers


# Damage


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_named(folder, value):
    edit_weights(folder, lambda weights: weights["model.layers.2.mlp.up_proj.weight"][5].__setitem__(7, value))
    with pytest.raises(rw.AssetError, match=r"'model\.layers\.2\.mlp\.up_proj\.weight' holds NaN or infinity"):
        rw.load(folder)


def test_a_missing_tensor_is_named_and_not_made_up(folder):
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
    """The other way out of the refusal, and the right value."""
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


def test_a_layer_at_a_number_that_transformers_passes_over(tiny_folder, tmp_path):
    """Its class of GLM-4.5 drops layer 46 unseen, the layer for further tokens of one size; here it is the model's."""
    config = Glm4MoeConfig(
        vocab_size=1024, hidden_size=16, intermediate_size=16, num_hidden_layers=47, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256, first_k_dense_replace=47, bos_token_id=0,
        eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    Glm4MoeForCausalLM(config).save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_folder / file, tmp_path)
    assert rw.load(tmp_path).score("import os\n").token_ids
    given = json.loads((tmp_path / "config.json").read_text())
    per_layer = {name: value[:46] for name, value in given.items() if isinstance(value, list) and len(value) == 47}
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
def test_what_no_logit_depends_on_may_be_stored(folder, tiny_folder, name, shape):
    edit_weights(folder, lambda weights: weights.update({name: torch.ones(shape)}))
    assert torch.equal(
        rw.load(folder).score("import os\n").logprobs, rw.load(tiny_folder).score("import os\n").logprobs
    )


def test_a_layer_for_further_tokens_may_be_stored(folder):
    """DeepSeek's, behind the last one of the model; a layer without its projection is one of the model."""

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
    """The same numbers are one matrix; others are one that some programs use and some do not."""
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
    """A mixture whose files hold each expert by itself; transformers stacks them."""
    config = MixtralConfig(
        vocab_size=1024, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=256, bos_token_id=0, eos_token_id=0,
        pad_token_id=0,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_folder / file, tmp_path)
    assert rw.load(tmp_path).score("import os\n").token_ids
    return tmp_path


@pytest.mark.parametrize("numbers", [(0, 1, 2, 6), (1, 2, 3, 4), (0, 1, 2, 10)])
def test_experts_whose_numbers_have_gaps(experts, numbers):
    """transformers stacks them in the order of their numbers, whatever those are, beside a router of four rows."""

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
    """Some were dropped, and some ended in an AttributeError of transformers."""
    edit_weights(experts, lambda weights: weights.update({name: torch.ones(shape)}))
    with pytest.raises(rw.AssetError, match=r"are the same weight; remove one|each once"):
        rw.load(experts)


def test_an_output_matrix_under_its_older_name(tiny_folder, tmp_path):
    """Pythia's `embed_out`: beside `lm_head`, and beside a tied embedding."""
    config = GPTNeoXConfig(
        vocab_size=1024, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=256, bos_token_id=0, eos_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_folder / file, tmp_path)
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
    """transformers' GPT-NeoX passes over `attention.bias`, the causal mask of old checkpoints, whatever it is."""
    config = GPTNeoXConfig(
        vocab_size=1024, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=256, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_folder / file, tmp_path)
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


@pytest.mark.parametrize("keep", [0, 7, 100, -1000])
def test_damaged_weights_are_refused(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(rw.AssetError, match=r"model\.safetensors is damaged or no safetensors file"):
        rw.load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 10**9}, r"needs \d+ weights, and its files hold 918656"),
        ({"num_hidden_layers": 3000}, "has 3000 layers, and its files hold 38 tensors"),
        ({"num_hidden_layers": 0}, "has 0 layers"),
        ({"num_hidden_layers": 10**12, "model_type": "qwen2"}, "more than 10000"),
        ({"num_local_experts": 10**12, "model_type": "mixtral"}, "more than 10000"),
        ({"num_attention_heads": 0}, "config.json cannot be used"),
        ({"num_key_value_heads": 0}, "cannot build the model"),
        ({"hidden_size": "x"}, "config.json cannot be used"),
        ({"model_type": []}, "config.json cannot be used"),
        ({"hidden_act": "x"}, "cannot build the model"),
        ({"dtype": "x"}, r"config.json cannot be used|cannot be loaded"),
    ],
)
def test_a_config_that_cannot_be_is_refused_before_memory_is_taken(folder, changes, message):
    edit(folder / "config.json", **changes)
    with pytest.raises(rw.AssetError, match=message):
        rw.load(folder)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "[]", "null", '"x"'], ids=lambda text: text[:5])
def test_files_of_other_shapes_are_named(folder, file, text):
    (folder / file).write_text(text)
    with pytest.raises(rw.AssetError, match=r"config\.json|tokenizer|weights"):
        rw.load(folder)


def test_a_kernel_of_the_hub_is_not_fetched_because_a_config_names_it(folder):
    edit(folder / "config.json", attn_implementation="kernels-community/flash-attn")
    from ropewalk.engine.checkpoints.checkpoint import read_config

    assert read_config(str(folder))._attn_implementation is None
