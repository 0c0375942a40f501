"""Hugging Face configs of every rope type, and the rotary modules of transformers for comparison."""

from __future__ import annotations

import importlib
import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from ropewalk.scaling.hf import ConfiguredRope, read

TINY = {
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
TYPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
    "yarn, truncate": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 256,
        "truncate": False,
        "beta_fast": 8,
        "beta_slow": None,
    },
    "yarn, mscale": {
        "rope_type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 256,
        "mscale": 1.0,
        "mscale_all_dim": 0.707,
    },
    "yarn, one mscale": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 256,
        "mscale": 0.5,
    },
    "yarn, attention_factor over mscale": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 256,
        "attention_factor": 1.5,
        "mscale": 1.0,
        "mscale_all_dim": 0.707,
    },
    "yarn, no factor": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 128},
    "longrope": {
        "rope_type": "longrope",
        "original_max_position_embeddings": 256,
        "short_factor": [1.0 + 0.1 * i for i in range(8)],
        "long_factor": [1.0 + i for i in range(8)],
    },
    "longrope, factor": {
        "rope_type": "longrope",
        "factor": 16.0,
        "original_max_position_embeddings": 256,
        "short_factor": [1] * 8,
        "long_factor": [2] * 8,
        "attention_factor": 1.25,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.25},
    "proportional, factor": {"rope_type": "proportional", "partial_rotary_factor": 0.5, "factor": 4.0},
}


def llama(rope_parameters: dict[str, Any] | None = None, **fields: Any) -> transformers.LlamaConfig:
    theta = {"rope_theta": 1e4} if rope_parameters is not None else {}
    return transformers.LlamaConfig(**{**TINY, **fields}, rope_parameters={**theta, **(rope_parameters or {})})


def rotary_modules(config: Any) -> list[torch.nn.Module]:
    """The rotary modules in the modeling file of a config, built without the rest of the model."""
    name = type(config).__module__.replace("configuration_", "modeling_")
    classes = [
        member
        for label, member in vars(importlib.import_module(name)).items()
        if inspect.isclass(member)
        and member.__module__ == name
        and label.endswith("RotaryEmbedding")
        and not any(other in label for other in ("Vision", "Audio"))
    ]
    modules = []
    for cls in classes:
        try:
            modules.append(cls(config=config))
        except Exception:  # the rotary class of another part of a multimodal model
            continue
    return modules


def difference(module: torch.nn.Module, configured: dict[str | None, ConfiguredRope]) -> str:
    """The difference between a module and the config as read; empty if there is none."""
    for layer_type, entry in configured.items():
        prefix = "" if layer_type is None else f"{layer_type}_"
        expected = getattr(module, f"{prefix}inv_freq", None)
        if expected is None:
            return f"no {prefix}inv_freq"
        frequencies = entry.scaler.frequencies(entry.rope, 1)
        if expected.shape != frequencies.inv_freq.shape:
            return f"{layer_type}: {tuple(expected.shape)} against {tuple(frequencies.inv_freq.shape)}"
        # 2^-23 s: see transformers' float32 ramp in test_frequencies_of_transformers.
        if not torch.allclose(expected.double(), frequencies.inv_freq, rtol=1e-6 + 40 * 2.0**-23, atol=0):
            return f"{layer_type}: {expected} against {frequencies.inv_freq}"
        m = getattr(module, f"{prefix}attention_scaling")
        if m != pytest.approx(frequencies.attention_factor, rel=1e-12):
            return f"{layer_type}: attention factor {m} against {frequencies.attention_factor}"
    return ""


def assert_like_its_model(config: Any) -> dict[str | None, ConfiguredRope]:
    configured = read(config)
    modules = rotary_modules(config)
    assert modules, "the test found no rotary module"
    differences = [difference(module, configured) for module in modules]
    assert "" in differences, differences
    return configured


def old(**fields: Any) -> SimpleNamespace:
    """A config in an old form, which transformers' classes have not converted."""
    return SimpleNamespace(
        **{"model_type": "old", "hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 1024, **fields}
    )
