"""Conversion of tiny GGUF files, and of the real one, to Hugging Face folders."""

import json
import math
import os

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_gguf import DIM, HIDDEN, VOCAB, llama_tensors
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ropewalk import UnsupportedModel
from ropewalk.engine.checkpoints import assets, gguf_tokenizer
from ropewalk.engine.checkpoints.gguf_conversion import convert_gguf, converted_gguf, prepared_gguf
from ropewalk.engine.checkpoints.source import load_vocabulary


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch, request):
    if "model" not in request.keywords:
        monkeypatch.setenv("ROPEWALK_CACHE", str(tmp_path / "cache"))


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def test_weights_are_exact_and_in_the_order_of_transformers(write, tmp_path):
    out = convert_gguf(write(), tmp_path / "out")
    weights = load_file(out / "model.safetensors")
    assert weights.keys() == llama_tensors().keys()
    for name, tensor in llama_tensors().items():
        assert torch.equal(weights[name], torch.from_numpy(tensor)), name


def test_quantized_weights_become_plain_ones(write, tmp_path):
    path = write(quantized=True)
    weights = load_file(convert_gguf(path, tmp_path / "out") / "model.safetensors")
    stored = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.0.ffn_up.weight")
    expected = gguf.dequantize(stored.data, stored.tensor_type)
    assert torch.equal(weights["model.layers.0.mlp.up_proj.weight"], torch.from_numpy(expected))


def test_the_folder_loads_without_the_gguf_file(write, tmp_path):
    path = write()
    out = convert_gguf(path, tmp_path / "out")
    path.unlink()
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.float32
    assert model.config.rope_parameters == {"rope_type": "default", "rope_theta": 50_000.0}
    assert not hasattr(model.config, "quantization_config")
    assert len(AutoTokenizer.from_pretrained(out)) == VOCAB


def test_nothing_is_printed_and_the_loggers_are_put_back(write, tmp_path, capfd):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    path = write()
    capfd.readouterr()
    convert_gguf(path, tmp_path / "out")
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_a_terminal_sees_the_name_as_it_is(write, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("FORCE_COLOR", "1")
    path = write().rename(tmp_path / "[v2].gguf")
    convert_gguf(path, tmp_path / "out")
    assert "converting [v2].gguf" in capfd.readouterr().err


@pytest.mark.parametrize(("pre", "expected"), [("smollm", ["ĠĠ", "1", "2", "x"]), ("gpt-2", ["Ġ", "Ġ", "1", "2", "x"])])
def test_digits_are_split_as_the_tokenizer_was_trained(write, tmp_path, pre, expected):
    """With GPT-2's expression alone, the last space becomes part of the number's piece."""
    tokenizer = AutoTokenizer.from_pretrained(convert_gguf(write(pre=pre), tmp_path / "out"))
    assert tokenizer.tokenize("  12x") == expected


def test_the_vocabulary_alone_is_read_without_the_weights(write, tmp_path, monkeypatch):
    path = write(leave_out="blk.0.ffn_up")  # this file cannot be converted
    texts = ["  12x", "a Ġ", "<|endoftext|>"]
    alone = load_vocabulary(path)
    assert not (tmp_path / "cache").exists()
    prepared_gguf(write())
    monkeypatch.setattr(gguf_tokenizer, "read_gguf_tokenizer", lambda _: pytest.fail("read again"))
    assert [load_vocabulary(path).encode(text) for text in texts] == [alone.encode(text) for text in texts]


def linear(writer):
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(4.0)


def yarn(writer):
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_scaling_orig_ctx_len(32)


def older(writer, factor=4.0):
    writer.add_float32("llama.rope.scale_linear", factor)


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (linear, {"rope_type": "linear", "factor": 4.0}),
        (lambda w: w.add_rope_scaling_factor(4.0), {"rope_type": "linear", "factor": 4.0}),
        (lambda w: w.add_rope_scaling_factor(1.0), {"rope_type": "default"}),
        (older, {"rope_type": "linear", "factor": 4.0}),
        (lambda w: (linear(w), older(w, 2.0)), {"rope_type": "linear", "factor": 4.0}),
        (lambda w: (w.add_rope_scaling_type(gguf.RopeScalingType.NONE), older(w)), {"rope_type": "default"}),
        (
            yarn,
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": True,
            },
        ),
        (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.NONE), {"rope_type": "default"}),
    ],
)
def test_rotary_scaling_is_converted(write, tmp_path, extra, expected):
    config = config_of(convert_gguf(write(extra=extra), tmp_path / "out"))
    assert config["rope_parameters"] == {"rope_theta": 50_000.0, **expected}


def llama3_divisors(factor, low=1.0, high=4.0, length=8192):
    """The rope_freqs.weight that llama.cpp computes from the wavelengths for Llama 3.1."""
    divisors = []
    for n in range(DIM // 2):
        wavelength = 2 * math.pi * 50_000.0 ** (2 * n / DIM)
        if wavelength < length / high:
            divisors.append(1.0)
        elif wavelength > length / low:
            divisors.append(factor)
        else:
            smooth = (length / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, dtype=np.float32)


def test_llama3_divisors_are_recognised(write, tmp_path):
    divisors = llama3_divisors(32.0)
    assert len(set(divisors)) > 2, "the middle of the ramp is not in the test"
    path = write(extra=lambda writer: writer.add_tensor("rope_freqs.weight", divisors))
    model = AutoModelForCausalLM.from_pretrained(convert_gguf(path, tmp_path / "out"))
    inv_freq, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, "cpu")
    plain = 50_000.0 ** (-torch.arange(0, DIM, 2) / DIM)
    torch.testing.assert_close(plain / inv_freq, torch.from_numpy(divisors), rtol=1e-5, atol=0)


def test_other_divisors_and_a_temperature_become_longrope_factors(write, tmp_path):
    divisors = llama3_divisors(8.0, length=4096)

    def extra(writer):
        writer.add_tensor("rope_freqs.weight", divisors)
        writer.add_rope_scaling_attn_factors(1.25)

    model = AutoModelForCausalLM.from_pretrained(convert_gguf(write(extra=extra), tmp_path / "out"))
    inv_freq, attention_factor = ROPE_INIT_FUNCTIONS["longrope"](model.config, "cpu")
    plain = 50_000.0 ** (-torch.arange(0, DIM, 2) / DIM)
    torch.testing.assert_close(plain / inv_freq, torch.from_numpy(divisors), rtol=1e-5, atol=0)
    assert attention_factor == 1.25


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE), "'longrope'"),
        (lambda w: (yarn(w), w.add_rope_scaling_attn_factors(1.2)), "'yarn' with attn_factor"),
        (lambda w: (older(w), w.add_rope_scaling_attn_factors(1.2)), "'linear' with attn_factor"),
    ],
)
def test_rotary_scaling_that_would_be_lost_is_refused(write, tmp_path, extra, words):
    with pytest.raises(UnsupportedModel, match=f"{words}.*load the original checkpoint"):
        convert_gguf(write(extra=extra), tmp_path / "out")


def test_files_beside_the_gguf_file_are_not_read(write, tmp_path):
    convert_gguf(write(), tmp_path / "alone")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<7>", "tokenizer_class": "BertTokenizer"}')
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "beside")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "beside" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


def test_the_output_matrix_may_be_a_copy_of_the_embedding(write, tmp_path):
    rows = llama_tensors()["model.embed_tokens.weight"]
    path = write(extra=lambda writer: writer.add_tensor("output.weight", rows))
    weights = load_file(convert_gguf(path, tmp_path / "out") / "model.safetensors")
    assert torch.equal(weights.get("lm_head.weight", weights["model.embed_tokens.weight"]), torch.from_numpy(rows))
    path = write(extra=lambda writer: writer.add_tensor("output.weight", rows[::-1].copy()))
    weights = load_file(convert_gguf(path, tmp_path / "other") / "model.safetensors")
    assert torch.equal(weights["lm_head.weight"], torch.from_numpy(rows[::-1].copy()))


def test_a_file_is_converted_once_and_again_when_it_changes(write, monkeypatch):
    from ropewalk.engine.checkpoints import gguf_conversion as module

    path = write()
    folder = converted_gguf(path)
    assert config_of(folder)["hidden_size"] == HIDDEN
    with monkeypatch.context() as patch:
        patch.setattr(module, "_convert", lambda *a, **k: pytest.fail("converted twice"))
        assert converted_gguf(path) == folder
    os.utime(path, ns=(1, 1))
    assert converted_gguf(path) != folder
    assert [p.name for p in folder.parent.iterdir() if p.suffix == ".partial"] == []


@pytest.mark.model
def test_the_built_in_model_is_its_file():
    path = assets.fetch_files("smollm2-135m")
    folder = converted_gguf(path)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    with safe_open(folder / "model.safetensors", "pt") as weights:
        assert len(weights.keys()) == len(stored)
        for ours, theirs in (("v_proj", "attn_v"), ("k_proj", "attn_k")):
            tensor = stored[f"blk.7.{theirs}.weight"]
            expected = gguf.dequantize(tensor.data, tensor.tensor_type)
            if ours == "k_proj":  # 3 heads of 32 neighbouring pairs become two halves
                expected = expected.reshape(3, 32, 2, 576).transpose(0, 2, 1, 3).reshape(192, 576)
            name = f"model.layers.7.self_attn.{ours}.weight"
            assert torch.equal(weights.get_tensor(name), torch.from_numpy(expected))
    config = config_of(folder)
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 100_000.0}
    assert AutoTokenizer.from_pretrained(folder).tokenize("x = [\n    12]") == ["x", "Ġ=", "Ġ[", "ĊĠĠĠĠ", "1", "2", "]"]
