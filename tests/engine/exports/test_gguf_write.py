"""Written GGUF files, read back, are the same model and tokenizer."""

import json
import os
import shutil
from collections import Counter

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import ropewalk as rw
from ropewalk.engine.checkpoints import assets
from ropewalk.engine.checkpoints.gguf_conversion import convert_gguf
from ropewalk.engine.exports import gguf_write
from ropewalk.engine.exports.gguf_write import cached_gguf, write_gguf

TEXT = "def f(x):\n    return 12 + x  # it's 1990\n\n  naïve <|endoftext|> 日本"
HEADS, KV_HEADS, DIM = 4, 2, 32


@pytest.fixture
def variant(tiny_folder, tmp_path):
    """A function that copies the tiny model and changes its config and tokenizer.json."""

    def change(*, tokenizer=None, **config):
        folder = tmp_path / "variant"
        shutil.copytree(tiny_folder, folder)
        for file, changes in (("config.json", config), ("tokenizer.json", tokenizer or {})):
            content = json.loads((folder / file).read_text(encoding="utf-8"))
            (folder / file).write_text(json.dumps(content | changes), encoding="utf-8")
        return folder

    return change


def logits(folder):
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder)(TEXT).input_ids])
    with torch.inference_mode():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits[0]


def read_back(model, tmp_path, dtype="f32"):
    return convert_gguf(write_gguf(model, tmp_path / "out.gguf", dtype), tmp_path / "back")


def stored(path):
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def test_float32_read_back_is_the_model_and_the_tokenizer(tiny_folder, tmp_path):
    back = read_back(tiny_folder, tmp_path)
    assert (logits(back) - logits(tiny_folder)).abs().max() < 1e-5
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (tiny_folder, back))
    assert ours(TEXT).input_ids == theirs(TEXT).input_ids
    assert (ours.bos_token, ours.eos_token, len(ours)) == (theirs.bos_token, theirs.eos_token, len(theirs))


def test_a_loaded_model_is_written_as_its_folder_is(tiny_folder, tmp_path):
    model = rw.load(tiny_folder)
    from_folder = stored(write_gguf(tiny_folder, tmp_path / "folder.gguf", "f32"))
    from_memory = stored(write_gguf((model.hf, model.tokenizer), tmp_path / "model.gguf", "f32"))
    for name, tensor in from_folder.items():
        assert (tensor.data == from_memory[name].data).all(), name


def test_query_and_key_rows_of_a_rotary_pair_are_neighbours(tiny_folder, tmp_path):
    written = stored(write_gguf(tiny_folder, tmp_path / "out.gguf", "f32"))
    weights = load_file(tiny_folder / "model.safetensors")
    for short, projection, heads in (("attn_q", "q_proj", HEADS), ("attn_k", "k_proj", KV_HEADS)):
        weight = weights[f"model.layers.1.self_attn.{projection}.weight"].float()
        rows = [h * DIM + n + half for h in range(heads) for n in range(DIM // 2) for half in (0, DIM // 2)]
        assert torch.equal(torch.tensor(written[f"blk.1.{short}.weight"].data), weight[rows])


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_sixteen_bits_are_the_nearest(tiny_folder, tmp_path, dtype):
    kind = torch.bfloat16 if dtype == "bf16" else torch.float16
    back = load_file(read_back(tiny_folder, tmp_path, dtype) / "model.safetensors")
    for name, tensor in load_file(tiny_folder / "model.safetensors").items():
        expected = tensor if tensor.ndim == 1 else tensor.to(kind)
        assert torch.equal(back[name], expected.float()), name


def test_q8_0_keeps_every_weight_within_its_step(tiny_folder, tmp_path):
    folder = read_back(tiny_folder, tmp_path, "q8_0")
    back = load_file(folder / "model.safetensors")
    for name, tensor in load_file(tiny_folder / "model.safetensors").items():
        blocks = tensor.float().reshape(-1, 32)
        step = blocks.abs().amax(1, keepdim=True) / 127
        error = (back[name].reshape(-1, 32) - blocks).abs()
        if tensor.ndim == 1:
            assert not error.any(), name
        bound = 0.5 + 127 * 2**-11  # rounding of the weight, and of the scale, a float16, times up to 127
        assert (error <= bound * step * (1 + 1e-5)).all(), name
    assert (logits(folder).argmax(-1) == logits(tiny_folder).argmax(-1)).float().mean() > 0.9


def test_matrices_that_q8_0_cannot_hold_are_f16(variant, tmp_path):
    folder = variant(intermediate_size=40)
    weights = load_file(folder / "model.safetensors")
    for name in list(weights):
        if "mlp" in name:
            weights[name] = weights[name][:40] if "down" not in name else weights[name][:, :40]
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    kinds = {
        name: tensor.tensor_type.name for name, tensor in stored(write_gguf(folder, tmp_path / "o", "q8_0")).items()
    }
    assert kinds["blk.0.ffn_down.weight"] == "F16"
    assert kinds["blk.0.ffn_up.weight"] == "Q8_0"
    assert kinds["blk.0.ffn_norm.weight"] == "F32"


def test_an_output_matrix_of_its_own_is_written(variant, tmp_path):
    folder = variant(tie_word_embeddings=False)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(weights, folder / "model.safetensors")
    assert (logits(read_back(folder, tmp_path)) - logits(folder)).abs().max() < 1e-5


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ],
)
def test_rotary_scaling_is_written(variant, tmp_path, rope):
    folder = variant(rope_parameters={"rope_theta": 10_000.0, **rope}, max_position_embeddings=65_536)
    back = json.loads((read_back(folder, tmp_path) / "config.json").read_text())
    assert back["rope_parameters"].items() >= {"rope_theta": 10_000.0, **rope}.items()
    assert back["max_position_embeddings"] == 65_536


PREFIXED = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"architectures": ["MistralForCausalLM"], "model_type": "mistral"}, "is a MistralForCausalLM; only Llama"),
        ({"attention_bias": True}, "attention_bias True"),
        ({"hidden_act": "gelu"}, "hidden_act gelu"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "dynamic-ntk:2 depends on the length",
        ),
        ({"tokenizer": {"normalizer": {"type": "NFC"}}}, "normalizes texts .NFC."),
        ({"tokenizer": {"pre_tokenizer": {"type": "Whitespace"}}}, "BPE after Whitespace"),
        ({"tokenizer": {"pre_tokenizer": None}}, "BPE after none"),
        ({"tokenizer": {"pre_tokenizer": PREFIXED}}, "by ByteLevel in a way that has no name in GGUF"),
    ],
)
def test_a_model_that_the_format_cannot_hold_is_refused(variant, tmp_path, config, words):
    with pytest.raises((rw.UnsupportedModel, rw.ConfigError), match=words):
        write_gguf(variant(**config), tmp_path / "out.gguf")
    assert [file.name for file in tmp_path.iterdir()] == ["variant"]


def test_mistakes_are_refused(tiny_folder, tmp_path):
    with pytest.raises(rw.ConfigError, match=r"unknown GGUF dtype 'q8'\. Did you mean 'q8_0'"):
        write_gguf(tiny_folder, tmp_path / "out.gguf", "q8")
    with pytest.raises(rw.AssetError, match="no Hugging Face checkpoint"):
        write_gguf(tmp_path, tmp_path / "out.gguf")
    with pytest.raises(rw.AssetError, match=r"out\.gguf: cannot be written"):
        write_gguf(tiny_folder, tmp_path / "none" / "out.gguf")
    (tmp_path / "file").write_text("")
    with pytest.raises(rw.AssetError, match=r"out\.gguf: cannot be written \(Not a directory\)"):
        write_gguf(tiny_folder, tmp_path / "file" / "out.gguf")


def test_an_interrupted_file_is_not_there(tiny_folder, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf_write, "quantize", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_gguf(tiny_folder, tmp_path / "out.gguf")
    assert not list(tmp_path.iterdir())


def test_a_folder_is_written_once_and_again_when_it_changes(variant, tmp_path, monkeypatch):
    monkeypatch.setenv("ROPEWALK_CACHE", str(tmp_path / "cache"))
    folder = variant()
    file = cached_gguf(folder, "q8_0")
    with monkeypatch.context() as patch:
        patch.setattr(gguf_write, "write_gguf", lambda *_: pytest.fail("written twice"))
        assert cached_gguf(folder, "q8_0") == file
    assert cached_gguf(folder, "f16") != file
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert cached_gguf(folder, "q8_0") != file


@pytest.mark.model
def test_the_built_in_models_vocabulary_is_that_of_its_file(tmp_path):
    path = write_gguf(assets.fetch("smollm2-135m"), tmp_path / "out.gguf", "f16")
    ours, theirs = (gguf.GGUFReader(file) for file in (path, assets.fetch_files("smollm2-135m")))
    new = set(ours.fields) - set(theirs.fields)
    stated = {"llama.attention.key_length", "llama.attention.value_length", "tokenizer.ggml.add_eos_token"}
    assert new == stated | {"tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"}
    for name in set(ours.fields) - new - {"general.name", "general.file_type", "GGUF.kv_count"}:
        assert ours.fields[name].contents() == theirs.fields[name].contents(), name
    assert {tensor.name for tensor in ours.tensors} == {tensor.name for tensor in theirs.tensors}
    assert Counter(tensor.tensor_type.name for tensor in ours.tensors) == {"F16": 211, "F32": 61}


# What a vocabulary says beside its tokens


def llama3_folder(variant, **generation):
    """The tiny model with properties of Llama 3's tokenizer: its pre-tokenizer, ignore_merges, a start token."""
    split = {"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated", "invert": False}
    tokens = {"id": 0, "type_id": 0}
    folder = variant()
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    start = content["added_tokens"][0]["content"]
    merges = content["model"]["merges"]
    content["model"] |= {
        "ignore_merges": True,
        "merges": merges[: len(merges) // 2],
    }  # the other tokens need ignore_merges
    content["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            split,
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        ],
    }
    single = [{"SpecialToken": {**tokens, "id": start}}, {"Sequence": {**tokens, "id": "A"}}]
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {start: {"id": start, "ids": [content["added_tokens"][0]["id"]], "tokens": [start]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize("stated", [True, False])
def test_a_llama_3_vocabulary_reads_back(variant, tmp_path, monkeypatch, stated):
    """Also from a file that does not say that texts begin with the start token."""
    folder = llama3_folder(variant)
    if not stated:
        monkeypatch.setattr(gguf.GGUFWriter, "add_add_bos_token", lambda *_: None)
    back = read_back(folder, tmp_path)
    ours, theirs = (AutoTokenizer.from_pretrained(source) for source in (folder, back))
    assert ours(TEXT).input_ids == theirs(TEXT).input_ids
    assert theirs(TEXT).input_ids[0] == theirs.bos_token_id
    scores = [rw.load(source, dtype="float32", compile=False).score(TEXT).logprobs for source in (folder, back)]
    assert (scores[0] - scores[1]).abs().max() < 1e-4


def test_every_end_token_is_written_and_read(variant, tmp_path):
    folder = variant()
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 7, 300]}))
    path = write_gguf(folder, tmp_path / "out.gguf", "f32")
    fields = gguf.GGUFReader(path).fields
    assert [fields[f"tokenizer.ggml.{kind}_token_id"].contents() for kind in ("eos", "eot", "eom")] == [0, 7, 300]
    back = rw.load(path, compile=False)
    assert back.stop_ids == rw.load(folder, compile=False).stop_ids == {0, 7, 300}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 7, 300, 301]}))
    with pytest.raises(rw.UnsupportedModel, match="4 tokens end its texts, and a GGUF file holds three"):
        write_gguf(folder, tmp_path / "more.gguf")
