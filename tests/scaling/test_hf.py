"""Configs are read as transformers' own models read them."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
import transformers
from hf_configs import TINY, TYPES, assert_like_its_model, difference, llama, old, rotary_modules

from ropewalk.errors import ConfigError, RopewalkError
from ropewalk.scaling import (
    DynamicNTK,
    Linear,
    Llama3,
    LongRoPE,
    RopeSpec,
    Scaler,
    StepLog,
    YaRN,
)
from ropewalk.scaling.hf import ConfiguredRope, read


@pytest.mark.parametrize("name", TYPES)
def test_rope_types(name: str) -> None:
    configured = assert_like_its_model(llama(dict(TYPES[name])))
    assert list(configured) == [None]
    entry = configured[None]
    assert entry.max_length == 1024
    original = TYPES[name].get("original_max_position_embeddings")
    assert entry.rope.trained_length == (original or 1024)


def test_types_are_read_as_their_methods() -> None:
    def scaler(name: str) -> Scaler:
        return read(llama(dict(TYPES[name])))[None].scaler

    assert scaler("default") == Scaler()
    assert scaler("linear") == Linear(factor=3)
    assert scaler("dynamic") == DynamicNTK(factor=2)
    assert scaler("yarn, truncate") == YaRN(factor=4, truncate=False, beta_fast=8)
    assert scaler("yarn, mscale") == YaRN(factor=40, mscale=1, mscale_all_dim=0.707)
    assert scaler("yarn, one mscale") == YaRN(factor=4)
    assert scaler("yarn, attention_factor over mscale") == YaRN(factor=4, attention_factor=1.5, mscale_all_dim=0.707)
    assert scaler("yarn, no factor") == YaRN(factor=8)
    assert scaler("llama3") == Llama3(factor=8)
    assert scaler("longrope, factor") == LongRoPE(factor=16, short=(1.0,) * 8, long=(2.0,) * 8, attention_factor=1.25)
    assert scaler("proportional") == Scaler()
    assert scaler("proportional, factor") == Linear(factor=4)

    def rope(name: str, **fields: float) -> RopeSpec:
        return read(llama({**TYPES[name], **fields}))[None].rope

    plain = RopeSpec(dim=16, base=1e4, trained_length=1024)
    assert rope("proportional") == dataclasses.replace(plain, rotating_pairs=2)
    assert rope("proportional", partial_rotary_factor=1.0) == rope("default") == plain


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
@pytest.mark.parametrize("length", [100, 256, 257, 1024, 1025, 5000])
def test_length_dependent_types_follow_the_length_as_transformers_does(name: str, length: int) -> None:
    config = llama(dict(TYPES[name]))
    entry = read(config)[None]
    (module,) = rotary_modules(config)
    module(torch.zeros(1, 1, 1), torch.arange(length)[None])
    ours = entry.scaler.frequencies(entry.rope, length).inv_freq
    torch.testing.assert_close(module.inv_freq.double(), ours, rtol=1e-6, atol=0)


GEMMA_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
TWO_KINDS = {"layer_types": ["sliding_attention", "full_attention"]}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("MistralConfig", {"head_dim": 32, "rope_parameters": {"rope_theta": 1e6}}),
    "mixtral without head_dim": ("MixtralConfig", {"rope_parameters": {"rope_theta": 1e6}}),
    "qwen2 yarn": ("Qwen2Config", {"rope_parameters": {**TYPES["yarn"], "rope_theta": 1e6}}),
    "qwen3 head_dim": ("Qwen3Config", {"head_dim": 128, "rope_parameters": {"rope_theta": 1e6}}),
    "phi3 longrope": (
        "Phi3Config",
        {
            "original_max_position_embeddings": 128,
            "rope_parameters": {**TYPES["longrope"], "original_max_position_embeddings": 128, "rope_theta": 1e4},
        },
    ),
    "phi3 partial": (
        "Phi3Config",
        {"hidden_size": 128, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.75}},
    ),
    "gemma": ("GemmaConfig", {"head_dim": 16}),
    "gemma2": ("Gemma2Config", {"head_dim": 16}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 16, **TWO_KINDS, "rope_parameters": GEMMA_ROPES}),
    "gemma3 with one layer type": (
        "Gemma3TextConfig",
        {"head_dim": 16, "layer_types": ["sliding_attention"] * 2, "rope_parameters": GEMMA_ROPES},
    ),
    "gemma4": ("Gemma4TextConfig", {"head_dim": 16, "global_head_dim": 32, **TWO_KINDS}),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "gpt_neox rotary_pct": ("GPTNeoXConfig", {"rotary_pct": 0.5, "rotary_emb_base": 25000}),
    "stablelm": ("StableLmConfig", {}),
    "stablelm partial yarn": (
        "StableLmConfig",
        {"rope_parameters": {**TYPES["yarn"], "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ),
    "phi": ("PhiConfig", {"partial_rotary_factor": 0.5}),
    "glm": ("GlmConfig", {"head_dim": 32}),
    "minimax_m2 rotary_dim": ("MiniMaxM2Config", {"head_dim": 32, "rotary_dim": 16}),
    "gpt_oss": ("GptOssConfig", {"head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1}),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            "rope_parameters": {**TYPES["yarn, mscale"], "rope_theta": 1e4},
        },
    ),
    "ministral3": ("Ministral3Config", {"head_dim": 16}),
    "mistral4 shares the head": ("Mistral4Config", {"qk_rope_head_dim": 8, "qk_nope_head_dim": 24}),
    "cohere": ("CohereConfig", {}),
    "cohere2": ("Cohere2Config", {}),
    "olmo3 nested": ("Olmo3Config", TWO_KINDS),
    "smollm3": ("SmolLM3Config", {}),
    "laguna": ("LagunaConfig", TWO_KINDS),
    "llama4": ("Llama4TextConfig", {"head_dim": 16}),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name: str) -> None:
    cls, fields = FAMILIES[name]
    config = getattr(transformers, cls)(**{**TINY, **json.loads(json.dumps(fields))})
    before = config.to_dict()
    configured = assert_like_its_model(config)
    assert config.to_dict() == before  # reading does not change the config
    # The config.json that the family itself writes gives the same.
    assert read(json.loads(config.to_json_string(use_diff=False))) == configured


def test_layer_types_have_their_own_entries() -> None:
    configured = read(transformers.Gemma3TextConfig(**{**TINY, **FAMILIES["gemma3"][1]}))
    assert set(configured) == {"full_attention", "sliding_attention"}
    assert configured["full_attention"].scaler == Linear(factor=8)
    assert configured["full_attention"].rope.base == 1e6
    assert configured["sliding_attention"].scaler == Scaler()
    unused = read(transformers.Gemma3TextConfig(**{**TINY, **FAMILIES["gemma3 with one layer type"][1]}))
    assert set(unused) == {"sliding_attention"}


def test_gemma4_heads_and_pairs_that_do_not_rotate() -> None:
    configured = read(transformers.Gemma4TextConfig(**{**TINY, **FAMILIES["gemma4"][1]}))
    assert configured["full_attention"].rope == RopeSpec(dim=32, base=1e6, trained_length=1024, rotating_pairs=4)
    assert configured["sliding_attention"].rope == RopeSpec(dim=16, base=1e4, trained_length=1024)


def test_multimodal_configs_are_read_for_their_text() -> None:
    text = {**TINY, "head_dim": 16, **TWO_KINDS, "rope_parameters": GEMMA_ROPES}
    whole = transformers.Gemma3Config(text_config=text)
    assert read(whole) == read(whole.text_config)


@pytest.mark.slow
def test_every_causal_language_model_of_transformers_is_read_right_or_refused() -> None:
    """The default config of each family: more than 100 are read as their module computes them, and none differs."""
    names = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    wrong: dict[str, Any] = {}
    read_right = 0
    for model_type in sorted(names):
        try:
            config = transformers.CONFIG_MAPPING[model_type]().get_text_config(decoder=True)
            modules = rotary_modules(config)
        except Exception:  # no usable default config, or no modeling file of its own
            continue
        try:
            configured = read(config)
        except RopewalkError:
            continue
        differences = [difference(module, configured) for module in modules]
        if "" in differences:
            read_right += 1
        else:
            wrong[model_type] = differences
    assert wrong == {}
    assert read_right > 100


# The older forms, on objects that transformers has not converted.


def test_rope_theta_alone() -> None:
    assert read(old(rope_theta=5e5)) == {
        None: ConfiguredRope(rope=RopeSpec(dim=16, base=5e5, trained_length=1024), scaler=Scaler(), max_length=1024)
    }


@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_rope_scaling_with_rope_theta(key: str) -> None:
    entry = read(old(rope_theta=1e4, rope_scaling={key: "linear", "factor": 4}))[None]
    assert entry.scaler == Linear(factor=4)
    assert entry.rope.trained_length == entry.max_length == 1024


def test_partial_rotary_factor_outside_and_inside() -> None:
    assert read(old(rope_theta=1e4, partial_rotary_factor=0.5))[None].rope.dim == 8
    inside = old(partial_rotary_factor=0.5, rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.25})
    assert read(inside)[None].rope.dim == 4


@pytest.mark.parametrize("kind", ["longrope", "su"])
def test_phi3_trained_length_outside(kind: str) -> None:
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    entry = read(old(rope_theta=1e4, original_max_position_embeddings=256, rope_scaling={"type": kind, **factors}))[
        None
    ]
    assert entry.rope.trained_length == 256
    assert entry.max_length == 1024
    assert entry.scaler == LongRoPE(factor=4, short=(1.0,) * 8, long=(4.0,) * 8)


def test_the_outside_length_does_not_touch_other_types() -> None:
    entry = read(old(rope_theta=1e4, original_max_position_embeddings=256))[None]
    assert entry.rope.trained_length == 1024


def test_layers_without_positions_are_left_out() -> None:
    config = old(
        layer_types=["full_attention", "sliding_attention"],
        rope_parameters={"full_attention": None, "sliding_attention": {"rope_theta": 1e4}},
    )
    assert set(read(config)) == {"sliding_attention"}


def test_config_json_of_a_released_model() -> None:
    text = """{"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 131072,
        "rope_theta": 500000.0, "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3"}}"""
    document = json.loads(text)
    assert read(document) == {
        None: ConfiguredRope(
            rope=RopeSpec(dim=16, base=5e5, trained_length=8192),
            scaler=Llama3(factor=8),
            max_length=131072,
            layers=tuple(range(32)),
        )
    }
    assert document == json.loads(text)  # the classes of transformers change their input


def test_a_family_fills_in_what_its_config_json_leaves_out() -> None:
    document = {"model_type": "stablelm", "hidden_size": 256, "num_attention_heads": 4}
    assert read(document)[None].rope.dim == 16  # a quarter of the head


@pytest.mark.parametrize(("extra", "left"), [({}, "m = 1.139"), ({"attention_factor": 1.2}, "m = 1.2")])
def test_a_factor_that_engines_read_differently_is_refused(extra: dict[str, float], left: str) -> None:
    """DeepSeek-R1-0528-Qwen3-8B: 0.878 times 0.1 ln 4 + 1 is 1 in vLLM; transformers ignores it."""
    document = {"model_type": "qwen3", "hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 131072}
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "rope_theta": 1e6, **extra}
    with pytest.raises(ConfigError, match=r"qwen3: engines disagree about attn_factor=0\.878") as caught:
        read(document | {"rope_parameters": yarn | {"attn_factor": 0.8782488562869419}})
    assert left in str(caught.value)
    plain = read(document | {"rope_parameters": yarn})[None].scaler
    assert read(document | {"rope_parameters": yarn | {"attn_factor": 1.0}})[None].scaler == plain
    if not extra:
        assert "replace it by attention_factor: 1 for" in str(caught.value)


def test_a_temperature_of_the_models_own() -> None:
    entry = read(transformers.Ministral3Config())[None]
    assert entry.temperature == StepLog(beta=0.1, length=16384)
    assert entry.rope == RopeSpec(dim=128, base=1e6, trained_length=16384)
    assert entry.scaler == YaRN(factor=16, mscale=1, mscale_all_dim=1)
    assert entry.max_length == 262144
    assert read(transformers.Mistral4Config())[None].temperature == StepLog(beta=0.1, length=8192)
    assert read(transformers.LlamaConfig())[None].temperature is None


@pytest.mark.parametrize("rope_type", ["default", "linear", "yarn"])
def test_a_temperature_beside_every_rope_type(rope_type: str) -> None:
    own = {"llama_4_scaling_beta": 0.25, "original_max_position_embeddings": 256}
    rope = {"rope_type": rope_type, "rope_theta": 1e4, **({} if rope_type == "default" else {"factor": 4.0})}
    entry = read(transformers.Ministral3Config(**TINY, head_dim=16, rope_parameters={**rope, **own}))[None]
    assert entry.temperature == StepLog(beta=0.25, length=256)
    assert entry.rope.trained_length == (1024 if rope_type == "default" else 256)


def test_no_beta_is_no_temperature() -> None:
    rope = {"rope_theta": 1e4, "llama_4_scaling_beta": 0.0, "original_max_position_embeddings": 256}
    assert read(transformers.Ministral3Config(**TINY, head_dim=16, rope_parameters=rope))[None].temperature is None
