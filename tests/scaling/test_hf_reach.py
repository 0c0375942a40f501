"""The length that a config promises, and what factors and position maps count from."""

from __future__ import annotations

import math

import pytest
from hf_configs import TYPES, llama

from ropewalk.errors import ConfigError
from ropewalk.scaling import Linear, Scaler
from ropewalk.scaling.hf import read
from ropewalk.scaling.spec import parse


def test_factors_count_from_the_trained_length_and_position_maps_from_the_models_reach() -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 256}
    entry = read(llama(yarn))[None]
    assert entry.reach(Linear(factor=8)) == 8 * 256
    assert entry.reach(parse("leaky-rerope:window=128,k=2")) == 128 + 2 * (1024 - 128)
    with pytest.raises(ConfigError, match="reaches 512 tokens, fewer than its 1k"):
        entry.check(Linear(factor=2))


STRETCHED: dict[str, tuple[dict[str, object], float]] = {
    "yarn": ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}, 4096),
    "yarn without a trained length": ({"rope_type": "yarn", "factor": 4.0}, 4096),
    "llama3": (dict(TYPES["llama3"]) | {"original_max_position_embeddings": 1024, "factor": 8.0}, 8192),
    "longrope": (dict(TYPES["longrope"]) | {"original_max_position_embeddings": 1024, "factor": 2.0}, 2048),
    "dynamic": ({"rope_type": "dynamic", "factor": 2.0}, math.inf),
    "linear": ({"rope_type": "linear", "factor": 2.0, "original_max_position_embeddings": 1024}, 2048),
    "linear without a trained length": (
        {"rope_type": "linear", "factor": 2.0},
        1024,
    ),  # can include it already
}


@pytest.mark.parametrize("name", STRETCHED)
def test_a_length_that_stayed_at_the_trained_one_is_no_limit(name: str) -> None:
    """As model cards add yarn to a config: 'none' has the reach of the same scaler over the plain config."""
    parameters, reach = STRETCHED[name]
    configured = read(llama(dict(parameters)))[None]
    assert configured.reach(Scaler()) == reach
    assert configured.rope.trained_length == 1024
    if name != "linear without a trained length":
        assert read(llama({"rope_type": "default"}))[None].reach(configured.scaler) == reach


@pytest.mark.parametrize("place", ["inside", "outside"])
@pytest.mark.parametrize(("length", "reach"), [(1024, 4096), (4096, 4096), (3000, 3000), (16384, 16384)])
@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3", "longrope"])
def test_one_rule_for_all_types(kind: str, length: int, reach: int, place: str) -> None:
    parameters = {**TYPES[kind], "rope_theta": 1e4, "factor": 4.0}
    trained = {"original_max_position_embeddings": 1024}
    document = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": length}
    document |= trained if place == "outside" else {}
    parameters.pop("original_max_position_embeddings", None)
    configured = read(document | {"rope_parameters": parameters | (trained if place == "inside" else {})})[None]
    assert (configured.rope.trained_length, configured.max_length) == (1024, reach)
    assert configured.reach(Scaler()) == reach
    assert ("stays at 1k" in configured.scaling_note) == (length == 1024)


@pytest.mark.parametrize(
    ("kind", "words"), [("linear", "the length before scaling is not stated"), ("dynamic", "growing from max_position")]
)
def test_the_note_says_where_the_reach_comes_from(kind: str, words: str) -> None:
    assert words in read(llama({"rope_type": kind, "factor": 4.0}))[None].scaling_note
    assert "1k (max_pos" not in read(llama({"rope_type": "default"}))[None].scaling_note


def test_a_length_that_the_config_promises_is_the_reach() -> None:
    document = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 3000}
    parameters = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 1024}
    configured = read(document | {"rope_parameters": parameters})[None]
    assert configured.reach(Scaler()) == 3000
    assert configured.scaling_text == "yarn:4"
