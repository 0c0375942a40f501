"""Configs with unknown, missing or invalid keys are refused in one line that names the value."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import transformers
from hf_configs import old

from ropewalk.errors import ConfigError, RopewalkError, UnsupportedModel
from ropewalk.scaling.hf import read


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
    "a temperature in another family": (
        entry(llama_4_scaling_beta=0.1),
        UnsupportedModel,
        "'llama_4_scaling_beta' in rope_parameters means queries scaled by their position; not supported",
    ),
    "no length of a temperature": (
        transformers.Ministral3Config(rope_parameters={"rope_theta": 1e4, "llama_4_scaling_beta": 0.1}),
        ConfigError,
        "ministral3: original_max_position_embeddings=None must be a whole number",
    ),
    "negative beta": (
        transformers.Ministral3Config(
            rope_parameters={
                "rope_theta": 1e4,
                "llama_4_scaling_beta": -1,
                "original_max_position_embeddings": 64,
            }
        ),
        ConfigError,
        "step-log: beta -1 must be above 0",
    ),
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
        "rope_parameters has 'rope_theta' beside the layer types",
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
