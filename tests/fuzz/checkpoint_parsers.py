"""Checkpoints: configs, safetensors and GGUF."""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
import string
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFValueType, GGUFWriter, TokenType
from hypothesis import strategies as st
from inputs import deep, header, json_mutants, mutants, parts, written
from parser import TINY, WORK, Parser, stored
from transformers import LlamaConfig, LlamaForCausalLM

from ropewalk import RopewalkError
from ropewalk.engine.checkpoints.checkpoint import read_config, read_weights
from ropewalk.engine.checkpoints.config import find_config
from ropewalk.engine.checkpoints.gguf_config import write_config
from ropewalk.engine.checkpoints.gguf_conversion import convert_gguf
from ropewalk.engine.checkpoints.gguf_file import GgufFile
from ropewalk.engine.checkpoints.gguf_weights import read_gguf_weights
from ropewalk.scaling.hf import read


@functools.cache
def _configs() -> list[dict[str, Any]]:
    plain = json.loads((TINY / "config.json").read_text())
    length = {"original_max_position_embeddings": 128}
    ropes = [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 2.0, "beta_fast": 32, "beta_slow": 1, "truncate": False, **length},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **length},
        {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0] * 16, "long_factor": [2.0] * 16, **length},
    ]
    older = {key: value for key, value in plain.items() if key != "rope_parameters"}
    families = ["qwen2", "gemma2", "gemma3_text", "phi3", "gpt_neox", "mistral", "cohere", "stablelm", "mixtral"]
    return [
        plain,
        *({**plain, "rope_parameters": {"rope_theta": 10_000.0, **rope}} for rope in ropes),
        {**older, "rope_theta": 10_000.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
        *({**plain, "model_type": family, "partial_rotary_factor": 0.5} for family in families),
    ]


def _config(value: Any) -> None:
    for configured in read(value if isinstance(value, dict) else {}).values():
        if configured.max_length < 10**12:
            configured.scaler.frequencies(configured.rope, configured.max_length)


def _folder(**changed: bytes) -> Path:
    """The tiny model with some files changed; a name is given with _ for its dot."""
    folder = WORK / "model"
    if not folder.exists():
        folder.mkdir()
        for file in TINY.iterdir():
            (folder / file.name).symlink_to(file)
    for name, data in changed.items():
        file = folder / name
        file.unlink(missing_ok=True)
        file.write_bytes(data)
    return folder


def _config_file(value: bytes) -> None:
    find_config(str(_folder(**{"config.json": value})))


@functools.cache
def _small() -> Path:
    """A Llama of a few thousand weights: of a megabyte of them a mutant would change nothing that is looked at."""
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(WORK / "small")
    return WORK / "small"


def _safetensors() -> st.SearchStrategy[bytes]:
    described, rest = parts(_small() / "model.safetensors")
    headers = json_mutants(described).map(header) | mutants(header(described))
    return headers.map(lambda changed: changed + rest) | mutants(header(described) + rest)


def _weights(value: bytes) -> None:
    folder = WORK / "weights"
    if not folder.exists():
        shutil.copytree(_small(), folder)
    (folder / "model.safetensors").unlink()  # what has mapped the last one keeps it
    (folder / "model.safetensors").write_bytes(value)
    read_weights(*find_config(str(folder)), attn_implementation="sdpa")


def _indexes() -> st.SearchStrategy[bytes]:
    described, _ = parts(_small() / "model.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(described, "model-1.safetensors")}
    index["weight_map"].pop("__metadata__", None)
    return json_mutants(index).map(written) | mutants(written(index)) | st.sampled_from(deep())


def _index(value: bytes) -> None:
    folder = WORK / "sharded"
    if not folder.exists():
        shutil.copytree(_small(), folder)
        (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_bytes(value)
    read_weights(*find_config(str(folder)), attn_implementation="sdpa")


@functools.cache
def gguf_file() -> bytes:
    """A small but whole Llama."""
    path = WORK / "sample.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(10_000.0)
    writer.add_key_value("llama.rope.scaling.type", "linear", GGUFValueType.STRING)
    writer.add_float32("llama.rope.scaling.factor", 2.0)
    tokens = ["<s>", "</s>", "<unk>", *string.ascii_lowercase, "Ġ", "ab", "Ġa"]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([int(TokenType.CONTROL)] * 3 + [int(TokenType.NORMAL)] * (len(tokens) - 3))
    writer.add_token_merges(["a b", "Ġ a"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (len(tokens), 32), "output": (len(tokens), 32), "output_norm": (32,)}
    shapes |= {f"blk.0.{name}": (32, 32) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
    shapes |= {f"blk.0.{name}": (32, 32) for name in ("ffn_gate", "ffn_up", "ffn_down")}
    shapes |= {f"blk.0.{name}": (32,) for name in ("attn_norm", "ffn_norm")}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def _ggufs() -> st.SearchStrategy[bytes]:
    return (
        mutants(gguf_file())
        | st.just(gguf_file())
        | st.binary(max_size=300)
        | st.binary(max_size=100).map(b"GGUF\3\0\0\0".__add__)
    )


def _gguf_header(value: bytes) -> None:
    file = GgufFile(stored("a.gguf", value))
    _ = file.weights, file.tensors, file.configured


def _gguf_whole(value: bytes) -> None:
    out = WORK / "converted"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    file = stored("b.gguf", value)
    for dtype in (None, torch.float32):
        with contextlib.suppress(RopewalkError):  # what transformers can read as well is still to be tried
            opened = GgufFile(file)
            write_config(opened, out)
            read_gguf_weights(opened, read_config(str(out)), dtype=dtype)
    convert_gguf(file, out)


CHECKPOINTS: dict[str, Parser] = {
    "config": Parser(lambda: json_mutants(*_configs()), _config, 150),
    "config.json": Parser(
        lambda: json_mutants(*_configs()).map(written) | mutants(*map(written, _configs())) | st.sampled_from(deep()),
        _config_file,
        40,
    ),
    "safetensors": Parser(_safetensors, _weights, 30),
    "safetensors index": Parser(_indexes, _index, 30),
    "GGUF header": Parser(_ggufs, _gguf_header, 100),
    "GGUF conversion": Parser(_ggufs, _gguf_whole, 5),
}
