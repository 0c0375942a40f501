"""Lengths of scalers as multiples of the trained length, wherever the model is known."""

import pytest
from click.testing import CliRunner
from transformers import LlamaConfig, LlamaForCausalLM

import ropewalk as rw
from ropewalk.cli.main import cli
from ropewalk.scaling import CriticalBase, ReRoPE

GREEDY = rw.SamplingParams(max_new_tokens=3, temperature=0)


def yarn_llama():
    """Plain frequencies trained on 64 tokens; what it reads by its own YaRN is 256."""
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=256, rope_parameters=rope,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_load_and_assignment(tiny_folder):
    model = rw.load(tiny_folder, rope="rerope:0.5x|logn")
    assert str(model.rope) == "rerope:128|logn"
    model.rope = "critical-base:4x"
    assert model.rope == CriticalBase(length=1024)
    with pytest.raises(rw.ConfigError, match="window 512"):
        model.rope = "rerope:2x"
    assert model.rope == CriticalBase(length=1024)


def test_sessions(tiny_folder, tmp_path):
    model = rw.load(tiny_folder)
    with model.session() as chat:
        chat.append("import os\n" * 20)
        model.rope = "rerope:0.5x"
        written = chat.generate("", GREEDY).text
        chat.save(tmp_path / "chat.safetensors")
    with model.session(tmp_path / "chat.safetensors") as again:
        assert again.text.endswith(written)


def test_patch(llama):
    trained = llama.config.max_position_embeddings
    with rw.patch(llama, "rerope:0.25x") as handle:
        assert handle.scaler == ReRoPE(window=trained // 4)
    with pytest.raises(rw.ConfigError, match=r"Did you mean 'rerope'\?"):
        rw.patch(llama, "reropee:0.25x")
    rw.patch(llama, "none").undo()  # the mistake has left nothing behind


def test_multiples_are_of_what_the_model_reads_by_its_own_scaling():
    with rw.patch(yarn_llama(), "rerope:0.5x") as handle:
        assert handle.scaler == ReRoPE(window=128)


def test_the_shell(tiny_folder, tmp_path):
    out = str(tmp_path / "rope.png")
    done = CliRunner().invoke(cli, ["show", "rerope:0.25x", "--trained", "4k", "--out", out], catch_exceptions=False)
    assert "rerope:1k" in done.output
    arguments = ["generate", str(tiny_folder), "import ", "--max-new-tokens", "4", "--temperature", "0", "--rope"]
    multiple, plain = (CliRunner().invoke(cli, [*arguments, spec]) for spec in ("rerope:0.5x", "rerope:128"))
    assert multiple.exit_code == 0
    assert multiple.output == plain.output
