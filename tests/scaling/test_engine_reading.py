"""The served lengths: vLLM's against its own ModelConfig, the others against the rules in their sources."""

import json
from pathlib import Path

import pytest

from ropewalk.errors import ConfigError
from ropewalk.scaling import YaRN
from ropewalk.scaling.engine_reading import EngineReading
from ropewalk.scaling.gguf_rope import GgufRope
from ropewalk.scaling.rope import RopeSpec
from ropewalk.scaling.serving import read_all, read_gguf

MODELS = json.loads((Path(__file__).resolve().parents[1] / "data" / "served.json").read_text(encoding="utf-8"))
"""`config`, and the result of vLLM 0.32's ModelConfig; `make interop` runs vLLM again."""


def reading(config, engine) -> EngineReading:
    return next(reading for reading in read_all(config) if reading.engine == engine)


@pytest.mark.parametrize("name", MODELS)
def test_vllm_serves_what_its_own_config_says(name):
    assert reading(MODELS[name]["config"], "vLLM").max_length == MODELS[name]["vllm"]


@pytest.mark.parametrize(
    ("name", "sglang", "llama_cpp"),
    [
        ("Llama 3.1", 131072, 131072),
        ("Llama, linear", 16384, 4096),
        ("Llama, dynamic", 8192, 4096),
        ("Llama, proportional", 16384, 4096),
        ("Qwen2.5 with YaRN", 32768, 32768),
        ("Phi-4-mini", 131072, 131072),
        ("Command-R", 131072, 131072),
        ("Command-R7B", 131072, 8192),
        ("Aya-23", 8192, 8192),
        ("max_sequence_length above", 32768, 8192),
        ("seq_length below", 2048, 8192),
        ("model_max_length above, and seq_length below", 2048, 8192),
    ],
)
def test_sglang_and_llama_cpp_read_other_keys(name, sglang, llama_cpp):
    config = MODELS[name]["config"]
    assert reading(config, "SGLang").max_length == sglang
    assert reading(config, "llama.cpp").max_length == llama_cpp
    assert reading(config, "transformers").max_length == config["max_position_embeddings"]
    assert reading(config, "ExLlamaV3").max_length is reading(config, "mlx-lm").max_length is None


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("Phi-4-mini", "serves fewer tokens than the 131072 of max_position_embeddings unless --max-model-len"),
        ("Command-R", "serves more tokens than the 8192 of max_position_embeddings unless --max-model-len"),
        ("Llama 2", ""),
    ],
)
def test_a_note_says_that_another_length_is_served(name, note):
    notes = [text for text in reading(MODELS[name]["config"], "vLLM").notes if text.startswith("serves")]
    assert len(notes) == bool(note)
    assert not note or note in notes[0]


@pytest.mark.parametrize("context_length", [1024, 2048, 4096, 8192])
def test_a_gguf_file_is_served_up_to_its_context_length(context_length):
    """The reach of its scaling, 8192, does not matter."""
    file = GgufRope.of(RopeSpec(dim=64, base=1e4, trained_length=2048), YaRN(factor=4))
    assert {served.max_length for served in read_gguf(file, context_length)} == {context_length}


@pytest.mark.parametrize("declared", [1024, 2048, 8192])
def test_a_yarn_config_is_served_up_to_what_it_declares(declared):
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
    config = MODELS["Llama 2"]["config"] | {"max_position_embeddings": declared, "rope_scaling": scaling}
    served = [engine.max_length for engine in read_all(config)]
    assert served == [declared] * 4 + [None, None]


@pytest.mark.parametrize(
    ("name", "layers", "computes", "others"),
    [
        ("Gemma 3 1B", "full_attention", "none", "base 10000"),
        ("Gemma 3 4B, rope_parameters", "full_attention", "linear:8", "base 10000"),
        ("OLMo 3", "full_attention", "yarn:8,attention_factor=1.2079441541679836", "base 500000"),
        ("OLMo 3, rope_parameters", "full_attention", "yarn:8", "base 500000"),
        ("ModernBERT decoder", "full_attention", "none", "base 10000"),
    ],
)
def test_layers_that_see_the_whole_text_are_read_where_types_differ(name, layers, computes, others):
    """Engines whose sources were not read for such models have a note and no length."""
    config = MODELS[name]["config"]
    first, vllm, *rest = read_all(config)
    assert first.label == vllm.label == computes and first.max_length == config["max_position_embeddings"]
    assert f"the table is about {layers}; those of type sliding_attention have {others}" in first.notes[-1]
    assert {(other.label, other.scaler, other.max_length) for other in rest} == {("not read", None, None)}
    assert all("has not been read" in other.notes[0] for other in rest)


@pytest.mark.parametrize(
    ("name", "words"),
    [("Ministral 3", "queries scaled by their position"), ("Qwen2.5-1M, dual chunk", "dual_chunk_attention_config")],
)
def test_a_note_says_what_the_table_leaves_out(name, words):
    assert words in reading(MODELS[name]["config"], "transformers").notes[-1]


def test_a_note_names_positions_on_several_axes():
    config = MODELS["Llama 2"]["config"] | {
        "model_type": "qwen2_vl_text", "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}
    }  # fmt: skip
    assert "mrope_section" in reading(config, "transformers").notes[-1]


@pytest.mark.parametrize(("old", "new"), [("yarn", "linear"), ("linear", "yarn")])
def test_vllm_refuses_two_types_that_differ(old, new):
    """Its ModelConfig: "Found conflicts between 'rope_type=yarn' and 'type=linear'"; transformers uses rope_type."""
    scaling = {"type": old, "rope_type": new, "factor": 4.0, "original_max_position_embeddings": 2048}
    if new == "linear":
        del scaling["original_max_position_embeddings"]
    config = MODELS["Llama 2"]["config"] | {"rope_scaling": scaling, "max_position_embeddings": 8192}
    refused = reading(config, "vLLM")
    assert refused.scaler is refused.max_length is None and f"type ({old}) and rope_type ({new})" in refused.notes[0]
    assert reading(config, "transformers").label == f"{new}:4"


def test_a_length_that_is_not_a_number_is_refused():
    with pytest.raises(ConfigError, match=r"seq_length='8k' must be a number of tokens"):
        read_all(MODELS["Llama 2"]["config"] | {"seq_length": "8k"})
