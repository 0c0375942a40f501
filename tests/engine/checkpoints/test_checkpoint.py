"""Untrusted checkpoints: only data is read, none of their code runs, and damage is named."""

import json

import pytest
import torch
from checkpoint_edits import edit, edit_weights
from safetensors.torch import load_file

import ropewalk as rw
from ropewalk.engine.chat_template import chat_headers

GREEDY = rw.SamplingParams(max_new_tokens=4, temperature=0)


@pytest.fixture
def evil(folder, monkeypatch):
    """A checkpoint with code that writes a file when it runs, and a user whose piped text begins with `y`."""
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
    """An object that runs code when it is unpickled."""

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


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(folder, value):
    edit_weights(folder, lambda weights: weights["model.layers.2.mlp.up_proj.weight"][5].__setitem__(7, value))
    with pytest.raises(rw.AssetError, match=r"'model\.layers\.2\.mlp\.up_proj\.weight' holds NaN or infinity"):
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
def test_an_impossible_config_is_refused_before_memory_is_allocated(folder, changes, message):
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
