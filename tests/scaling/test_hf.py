"""Configs read as transformers' own models read them, or refused; and written so that they read back."""

from __future__ import annotations

import importlib
import inspect
import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from ropewalk.errors import ConfigError, RopewalkError, UnsupportedModel
from ropewalk.scaling import (
    NTK,
    AlphaRoPE,
    Base,
    BaseBound,
    CoPE,
    CriticalBase,
    DynamicNTK,
    DynamicYaRN,
    Linear,
    Llama3,
    LongRoPE,
    MrRoPE,
    NTKByParts,
    NTKFixed,
    NTKMixed,
    Resonance,
    RopeSpec,
    Scaler,
    YaRN,
)
from ropewalk.scaling.hf import ConfiguredRope, read, write

ROPE = RopeSpec(dim=16, base=1e4, trained_length=256)
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
    """The rotary modules in the modeling file of a config, built from it; nothing else of the model is."""
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
    """What differs between a module and what was read; empty if nothing does."""
    for layer_type, entry in configured.items():
        prefix = "" if layer_type is None else f"{layer_type}_"
        theirs = getattr(module, f"{prefix}inv_freq", None)
        if theirs is None:
            return f"no {prefix}inv_freq"
        ours = entry.scaler.frequencies(entry.rope, 1)
        if theirs.shape != ours.inv_freq.shape:
            return f"{layer_type}: {tuple(theirs.shape)} against {tuple(ours.inv_freq.shape)}"
        # 2^-23 s: see transformers' float32 ramp in test_frequencies.
        if not torch.allclose(theirs.double(), ours.inv_freq, rtol=1e-6 + 40 * 2.0**-23, atol=0):
            return f"{layer_type}: {theirs} against {ours.inv_freq}"
        m = getattr(module, f"{prefix}attention_scaling")
        if m != pytest.approx(ours.attention_factor, rel=1e-12):
            return f"{layer_type}: attention factor {m} against {ours.attention_factor}"
    return ""


def assert_like_its_model(config: Any) -> dict[str | None, ConfiguredRope]:
    configured = read(config)
    modules = rotary_modules(config)
    assert modules, "the test found no rotary module"
    differences = [difference(module, configured) for module in modules]
    assert "" in differences, differences
    return configured


# Reading, against the models themselves.


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
    assert scaler("yarn, attention_factor over mscale") == YaRN(factor=4, attention_factor=1.5)
    assert scaler("yarn, no factor") == YaRN(factor=8)
    assert scaler("llama3") == Llama3(factor=8)
    assert scaler("longrope, factor") == LongRoPE(factor=16, short=(1.0,) * 8, long=(2.0,) * 8, attention_factor=1.25)
    assert scaler("proportional") == Scaler()
    assert scaler("proportional, factor") == Linear(factor=4)
    assert read(llama(dict(TYPES["proportional"])))[None].rope == RopeSpec(
        dim=16, base=1e4, trained_length=1024, rotating_pairs=2
    )


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
    "mistral4 shares the head": ("Mistral4Config", {"qk_rope_head_dim": 8, "qk_nope_head_dim": 24}),
    "cohere": ("CohereConfig", {}),
    "cohere2": ("Cohere2Config", {}),
    "olmo3 nested": ("Olmo3Config", TWO_KINDS),
    "smollm3": ("SmolLM3Config", {}),
    "laguna": ("LagunaConfig", TWO_KINDS),
    "llama4": ("Llama4TextConfig", {"head_dim": 16}),
}
REFUSED = {"mistral4 shares the head": UnsupportedModel}


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name: str) -> None:
    cls, fields = FAMILIES[name]
    config = getattr(transformers, cls)(**{**TINY, **json.loads(json.dumps(fields))})
    if name in REFUSED:
        with pytest.raises(REFUSED[name]):
            read(config)
        return
    before = config.to_dict()
    configured = assert_like_its_model(config)
    assert config.to_dict() == before  # reading leaves the config alone
    # The config.json that the family itself writes says the same.
    assert read(json.loads(config.to_json_string(use_diff=False))) == configured


def test_layer_types_have_their_own_entries() -> None:
    configured = read(transformers.Gemma3TextConfig(**{**TINY, **FAMILIES["gemma3"][1]}))
    assert set(configured) == {"full_attention", "sliding_attention"}
    assert configured["full_attention"].scaler == Linear(factor=8)
    assert configured["full_attention"].rope.base == 1e6
    assert configured["sliding_attention"].scaler == Scaler()
    unused = read(transformers.Gemma3TextConfig(**{**TINY, **FAMILIES["gemma3 with one layer type"][1]}))
    assert set(unused) == {"sliding_attention"}


def test_gemma4_heads_and_pairs_that_rest() -> None:
    configured = read(transformers.Gemma4TextConfig(**{**TINY, **FAMILIES["gemma4"][1]}))
    assert configured["full_attention"].rope == RopeSpec(dim=32, base=1e6, trained_length=1024, rotating_pairs=4)
    assert configured["sliding_attention"].rope == RopeSpec(dim=16, base=1e4, trained_length=1024)


def test_multimodal_configs_are_read_for_their_text() -> None:
    text = {**TINY, "head_dim": 16, **TWO_KINDS, "rope_parameters": GEMMA_ROPES}
    whole = transformers.Gemma3Config(text_config=text)
    assert read(whole) == read(whole.text_config)


@pytest.mark.slow
def test_every_causal_language_model_of_transformers_is_read_right_or_refused() -> None:
    """The default config of each family: 120 or more are read as their module computes them, none otherwise."""
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


# The older forms, on objects that transformers has not made uniform.


def old(**fields: Any) -> SimpleNamespace:
    return SimpleNamespace(
        **{"model_type": "old", "hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 1024, **fields}
    )


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


def test_config_json_of_a_real_kind() -> None:
    text = """{"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 131072,
        "rope_theta": 500000.0, "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3"}}"""
    document = json.loads(text)
    assert read(document) == {
        None: ConfiguredRope(
            rope=RopeSpec(dim=16, base=5e5, trained_length=8192), scaler=Llama3(factor=8), max_length=131072
        )
    }
    assert document == json.loads(text)  # the classes of transformers write into what they are given


def test_a_family_fills_in_what_its_config_json_leaves_out() -> None:
    document = {"model_type": "stablelm", "hidden_size": 256, "num_attention_heads": 4}
    assert read(document)[None].rope.dim == 16  # a quarter of the head


# Refusals.


def entry(**parameters: Any) -> SimpleNamespace:
    return old(rope_parameters={"rope_theta": 1e4, **parameters})


BAD: dict[str, tuple[Any, type[RopewalkError], str]] = {
    "gpt2": (transformers.GPT2Config(), UnsupportedModel, "gpt2 has no rotary embedding to scale: no rope_parameters"),
    "gpt2 json": ({"model_type": "gpt2"}, UnsupportedModel, "gpt2 has no rotary embedding to scale"),
    "alibi": (transformers.FalconConfig(alibi=True), UnsupportedModel, "falcon has alibi=True"),
    "no positions": (
        transformers.GraniteMoeHybridConfig(),
        UnsupportedModel,
        "granitemoehybrid has position_embedding_type=None",
    ),
    "mrope": (entry(mrope_section=[4, 2, 2]), UnsupportedModel, "'mrope_section' in rope_parameters means positions"),
    "qwen2 vl": (
        transformers.Qwen2VLConfig(text_config={"rope_parameters": {"rope_theta": 1e6, "mrope_section": [16, 24, 24]}}),
        UnsupportedModel,
        "qwen2_vl_text: 'mrope_section' in rope_parameters means positions on several axes",
    ),
    "ministral3": (transformers.Ministral3Config(), UnsupportedModel, "'llama_4_scaling_beta'"),
    "axial": (entry(rope_type="axial"), UnsupportedModel, "rope type 'axial' is not supported. Known: default,"),
    "unknown type": (entry(rope_type="yran"), UnsupportedModel, "'yran' is not supported. Did you mean 'yarn'?"),
    "unknown model": ({"model_type": "zzz"}, UnsupportedModel, "the installed transformers has no model_type 'zzz'"),
    "odd rotary dimension": (
        entry(partial_rotary_factor=0.45),
        UnsupportedModel,
        "head_dim 16 with partial_rotary_factor 0.45 rotates 7 dimensions",
    ),
    "no head": (SimpleNamespace(rope_theta=1e4, max_position_embeddings=8), UnsupportedModel, "the head dimension"),
    "no model_type": ({"rope_theta": 1e4}, ConfigError, "the config has no 'model_type'"),
    "unknown key": (
        entry(rope_type="yarn", factor=4, original_max_position_embeddings=256, beta_fats=3),
        ConfigError,
        "unknown key 'beta_fats' for rope type 'yarn'. Did you mean 'beta_fast'?",
    ),
    "key of another type": (entry(factor=4.0), ConfigError, "unknown key 'factor' for rope type 'default'"),
    "no factor": (entry(rope_type="linear"), ConfigError, "rope type 'linear' needs 'factor' in rope_parameters"),
    "null factor": (entry(rope_type="linear", factor=None), ConfigError, "rope type 'linear' needs 'factor'"),
    "no length": (
        entry(rope_type="yarn", factor=4.0),
        ConfigError,
        "rope type 'yarn' needs 'original_max_position_embeddings'",
    ),
    "no theta": (
        old(rope_scaling={"type": "linear", "factor": 2.0}),
        ConfigError,
        "rope type 'linear' needs 'rope_theta'",
    ),
    "no maximum": (
        SimpleNamespace(rope_theta=1e4, head_dim=8),
        ConfigError,
        "max_position_embeddings=None must be a whole number of tokens",
    ),
    "text": (entry(rope_type="linear", factor="4"), ConfigError, "factor='4' must be a number"),
    "bool": (entry(rope_type="linear", factor=True), ConfigError, "factor=True must be a number"),
    "nan": (entry(rope_type="linear", factor=math.nan), ConfigError, "factor=nan must be a number"),
    "below one": (entry(rope_type="linear", factor=0.5), ConfigError, "factor 0.5 must be at least 1"),
    "zero theta": (old(rope_parameters={"rope_theta": 0}), ConfigError, "rotary base 0.0 must be above 1"),
    "share": (entry(partial_rotary_factor=1.5), ConfigError, "partial_rotary_factor 1.5 must be above 0"),
    "truncate": (
        entry(rope_type="yarn", factor=4, original_max_position_embeddings=256, truncate=None),
        ConfigError,
        "truncate=None must be true or false",
    ),
    "fraction of a token": (
        entry(rope_type="yarn", factor=4, original_max_position_embeddings=256.5),
        ConfigError,
        "original_max_position_embeddings=256.5 must be a whole number",
    ),
    "longrope list": (
        entry(rope_type="longrope", original_max_position_embeddings=256, short_factor=2.0, long_factor=[1.0] * 8),
        ConfigError,
        "short_factor=2.0 must be a list of numbers",
    ),
    "longrope count": (
        entry(rope_type="longrope", original_max_position_embeddings=256, short_factor=[1.0], long_factor=[1.0] * 8),
        ConfigError,
        "short has 1 numbers; rotary dimension 16 needs 8",
    ),
    "beside layer types": (
        old(rope_parameters={"rope_theta": 1e4, "full_attention": {"rope_theta": 1e4}}),
        ConfigError,
        "rope_parameters holds 'rope_theta' beside the layer types",
    ),
    "layer type of no layer": (
        old(layer_types=["full_attention"], rope_parameters={"full_atention": {"rope_theta": 1e4}}),
        ConfigError,
        "no layer has the type 'full_atention' of rope_parameters. Did you mean 'full_attention'?",
    ),
    "what transformers refuses": (
        {"model_type": "llama", "rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        ConfigError,
        "transformers does not accept this llama config",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_refusals_are_one_line_that_names_the_value(name: str) -> None:
    config, error, message = BAD[name]
    with pytest.raises(error) as caught:
        read(config)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_keys_in_a_config_json_are_named() -> None:
    document = {"model_type": "llama", "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}
    with pytest.raises(ConfigError, match="low_freq_factor"):
        read(document)


# Writing.


def reread(parameters: dict[str, Any], **fields: Any) -> ConfiguredRope:
    """Through JSON and the class of transformers, whose own module must agree."""
    config = transformers.LlamaConfig(
        **{**TINY, "max_position_embeddings": 256, **fields, "rope_parameters": json.loads(json.dumps(parameters))}
    )
    return assert_like_its_model(config)[None]


NATIVE: list[tuple[Scaler, str]] = [
    (Scaler(), "default"),
    (Linear(factor=1), "default"),
    (Linear(factor=4), "linear"),
    (NTK(factor=4), "default"),
    (Base(base=5e5), "default"),
    (CriticalBase(length=1024), "default"),
    (DynamicNTK(factor=2), "dynamic"),
    (YaRN(factor=4), "yarn"),
    (YaRN(factor=4, truncate=False, beta_fast=16, beta_slow=2), "yarn"),
    (YaRN(factor=4, mscale=1, mscale_all_dim=0.7), "yarn"),
    (YaRN(factor=4, attention_factor=1.2), "yarn"),
    (NTKByParts(factor=4), "yarn"),
    (Llama3(factor=8, low_freq_factor=0.5, high_freq_factor=3), "llama3"),
    (LongRoPE(factor=4, short=tuple(range(1, 9)), long=tuple(range(2, 10))), "longrope"),
    (LongRoPE(factor=4, short=(1.0,) * 8, long=(2.0,) * 8, attention_factor=1.1), "longrope"),
]
CARRIED: list[Scaler] = [
    NTKFixed(factor=4),
    NTKMixed(factor=8, b=0.5),
    MrRoPE(factor=4),
    MrRoPE(factor=4, uniform=True),
    AlphaRoPE(factor=4),
    CoPE(),
    Resonance(),
    YaRN(factor=4) | Resonance(),
    LongRoPE(factor=4, short=(1.0,) * 8, long=(2.5,) * 8) | Resonance(),
]


def assert_same(scaler: Scaler, rope: RopeSpec, back: ConfiguredRope, rtol: float) -> None:
    for length in (1, rope.trained_length, rope.trained_length + 1, 8 * rope.trained_length):
        ours, theirs = scaler.frequencies(rope, length), back.scaler.frequencies(back.rope, length)
        # 1e-25 radians a token is a pair at rest.
        torch.testing.assert_close(ours.inv_freq, theirs.inv_freq, rtol=rtol, atol=1e-25)
        assert theirs.attention_factor == pytest.approx(ours.attention_factor, rel=1e-12)


@pytest.mark.parametrize(("scaler", "rope_type"), NATIVE, ids=str)
def test_native_types(scaler: Scaler, rope_type: str) -> None:
    parameters = write(ROPE, scaler)
    assert parameters["rope_type"] == rope_type
    back = reread(parameters)
    assert_same(scaler, ROPE, back, rtol=1e-6)  # another base is rounded to float32 anew
    if rope_type not in ("default", "linear"):
        assert back.rope == ROPE
        if type(scaler) is not NTKByParts:
            assert back.scaler == scaler


@pytest.mark.parametrize("scaler", CARRIED, ids=str)
def test_the_others_are_carried_as_longrope_exactly(scaler: Scaler) -> None:
    parameters = write(ROPE, scaler)
    assert parameters["rope_type"] == "longrope"
    back = reread(parameters)
    assert_same(scaler, ROPE, back, rtol=1e-12)
    assert back.rope == ROPE
    assert isinstance(back.scaler, LongRoPE)
    assert back.scaler.factor == max(scaler.reach(ROPE) / 256, 1)


def test_base_bound_is_written_as_its_base() -> None:
    pytest.importorskip("ropewalk.scaling.base_bound")
    parameters = write(ROPE, BaseBound(length=512))
    assert parameters == {"rope_type": "default", "rope_theta": BaseBound(length=512).base(ROPE)}


@pytest.mark.parametrize("name", TYPES)
def test_what_was_read_is_written_back(name: str) -> None:
    configured = read(llama(dict(TYPES[name])))[None]
    again = reread(write(configured.rope, configured.scaler), max_position_embeddings=1024)
    assert again.rope == configured.rope
    assert again.scaler == configured.scaler


@given(
    dim=st.integers(2, 32).map(lambda n: 2 * n),
    base=st.floats(100, 1e7),
    s=st.floats(1, 32),
    index=st.integers(0, len(CARRIED) - 2),
)
def test_carried_at_any_geometry(dim: int, base: float, s: float, index: int) -> None:
    rope = RopeSpec(dim=dim, base=base, trained_length=512)
    scaler = CARRIED[index]
    scaler = scaler.at(s) if hasattr(scaler, "at") else scaler
    parameters = write(rope, scaler)
    back = read(old(head_dim=dim, rope_parameters=json.loads(json.dumps(parameters, allow_nan=False))))[None]
    assert_same(scaler, rope, back, rtol=1e-12)


@pytest.mark.parametrize(
    ("scaler", "rope_type"),
    [
        (Scaler(), "proportional"),
        (Linear(factor=4), "proportional"),
        (NTK(factor=4), "proportional"),
        (YaRN(factor=4), "longrope"),
        (Llama3(), "longrope"),
        (LongRoPE(factor=4, short=(1.0,) * 8, long=(2.5,) * 8), "longrope"),
    ],
    ids=str,
)
def test_pairs_at_rest_are_written(scaler: Scaler, rope_type: str) -> None:
    for rotating in (0, 1, 3, 7):
        rope = RopeSpec(dim=16, base=1e4, trained_length=256, rotating_pairs=rotating)
        parameters = write(rope, scaler)
        assert parameters["rope_type"] == rope_type
        if rotating:  # a share of 0 is not a RoPE that can be read
            assert_same(scaler, rope, reread(parameters), rtol=1e-6)


@given(part=st.integers(1, 128), whole=st.integers(2, 128))
def test_the_share_of_the_head_survives_rounding(part: int, whole: int) -> None:
    head_dim, dim = 2 * whole, 2 * min(part, whole)
    rope = RopeSpec(dim=dim, base=1e4, trained_length=256)
    parameters = write(rope, YaRN(factor=2), head_dim=head_dim)
    assert read(old(head_dim=head_dim, rope_parameters=parameters))[None].rope == rope
    resting = RopeSpec(dim=head_dim, base=1e4, trained_length=1024, rotating_pairs=min(part, whole - 1))
    parameters = write(resting, Scaler(), head_dim=head_dim)
    assert read(old(head_dim=head_dim, rope_parameters=parameters))[None].rope == resting


def test_partial_rotary_models_keep_their_share() -> None:
    config = transformers.StableLmConfig(**TINY)
    configured = read(config)[None]
    parameters = write(configured.rope, NTKMixed(factor=4), head_dim=16)
    exported = transformers.StableLmConfig(**TINY, rope_parameters=parameters)
    back = assert_like_its_model(exported)[None]
    assert_same(NTKMixed(factor=4), configured.rope, back, rtol=1e-12)


def test_what_no_config_can_hold_is_refused() -> None:
    for scaler in (DynamicYaRN(), DynamicNTK() | Resonance(), DynamicYaRN() | Resonance()):
        with pytest.raises(ConfigError, match="follows the length of the text in a way that no rope type"):
            write(ROPE, scaler)
    resting = RopeSpec(dim=16, base=1e4, trained_length=256, rotating_pairs=4)
    with pytest.raises(ConfigError, match="follows the length"):
        write(resting, DynamicNTK())
    with pytest.raises(ConfigError, match="rotary dimension 16 of a head of 32 with 4 rotating pairs"):
        write(resting, Scaler(), head_dim=32)
    with pytest.raises(ConfigError, match="short has 3 numbers"):
        write(ROPE, LongRoPE(factor=2, short=(1.0,) * 3, long=(1.0,) * 3))


def test_facets_beyond_the_frequencies_are_refused() -> None:
    class Sharper(Scaler):
        name = "sharper"
        facet = "temperature"

    with pytest.raises(ConfigError, match="'sharper' sets the temperature, which a Hugging Face config cannot hold"):
        write(ROPE, YaRN(factor=4) | Sharper())
