"""How other engines read a config: that of `write_served` alike, and others with the known differences."""

import math
from pathlib import Path

import pytest
import torch
from static_specs import STATIC
from words import lines

from ropewalk.errors import ConfigError
from ropewalk.scaling import Linear, Llama3, YaRN, hf, hf_write
from ropewalk.scaling.engine_reading import same_frequencies
from ropewalk.scaling.longrope import fix_length
from ropewalk.scaling.rope import RopeSpec
from ropewalk.scaling.serving import ENGINES, read_all
from ropewalk.scaling.spec import parse

ROPE = RopeSpec(dim=64, base=10_000.0, trained_length=2048)


def config(parameters, max_length=8192, *, old=True, new=True):
    content = {
        "model_type": "llama",
        "hidden_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": max_length,
    }
    if new:
        content["rope_parameters"] = parameters
    if old:
        content["rope_theta"] = parameters["rope_theta"]
        content["rope_scaling"] = {k: v for k, v in parameters.items() if k != "rope_theta"}
    return content


def readings(parameters, **options):
    return {reading.engine: reading for reading in read_all(config(parameters, **options))}


@pytest.mark.parametrize("spec", STATIC)
def test_transformers_vllm_and_sglang_read_the_served_form_alike(spec):
    scaler = parse(spec, ROPE.trained_length)
    wanted = scaler.frequencies(ROPE)
    by_engine = readings(hf_write.write_served(ROPE, scaler))
    for engine in ("transformers", "vLLM", "SGLang"):
        for length in (100, 8192):
            frequencies = by_engine[engine].frequencies(length)
            torch.testing.assert_close(
                frequencies.inv_freq, wanted.inv_freq, rtol=1e-6, atol=1e-30
            )  # a pair that stands still
            assert frequencies.attention_factor == pytest.approx(wanted.attention_factor, rel=1e-6), engine


@pytest.mark.parametrize("spec", ["none", "linear:4", "yarn:4", "ntk-mixed:4"])
def test_a_head_that_rotates_in_part_says_its_share(spec):
    parameters = hf_write.write_served(ROPE, parse(spec), head_dim=128)
    assert parameters == {**hf_write.write_served(ROPE, parse(spec)), "partial_rotary_factor": 0.5}


@pytest.mark.parametrize("spec", ["none", "ntk:4", "yarn:4"])
def test_longrope_factors_are_served_on_request(spec):
    scaler = parse(spec)
    parameters = hf_write.write_served(ROPE, scaler, as_longrope=True)
    assert parameters["rope_type"] == "longrope"
    frequencies, wanted = readings(parameters)["vLLM"].frequencies(8192), scaler.frequencies(ROPE)
    torch.testing.assert_close(frequencies.inv_freq, wanted.inv_freq, rtol=1e-6, atol=0)
    assert frequencies.attention_factor == pytest.approx(wanted.attention_factor, rel=1e-6)


@pytest.mark.parametrize(
    ("spec", "rope_type"),
    [
        ("none", "default"),
        ("base:5e5", "default"),
        ("yarn:4", "yarn"),
        ("yarn:4,mscale=1,mscale_all_dim=0.7", "yarn"),
        ("yarn:4,attention_factor=1.3", "yarn"),
        ("yarn:4,attention_factor=1", "yarn"),
        ("yarn:1,attention_factor=1", "yarn"),
        ("yarn:4,attention_factor=1.3,mscale_all_dim=0.7", "yarn"),
    ],
)
def test_latent_attention_is_served_as_yarn_with_the_m_of_its_mscales(spec, rope_type):
    scaler = parse(spec)
    parameters = hf_write.write_served(ROPE, scaler, yarn_only=True)
    assert parameters["rope_type"] == rope_type and "attention_factor" not in parameters
    wanted = scaler.frequencies(ROPE)
    for engine in ("transformers", "vLLM", "SGLang"):
        frequencies = readings(parameters)[engine].frequencies(8192)
        torch.testing.assert_close(frequencies.inv_freq, wanted.inv_freq, rtol=1e-6, atol=0)
        assert frequencies.attention_factor == pytest.approx(wanted.attention_factor, rel=1e-6), engine
    if "mscale_all_dim" in spec:
        assert parameters["mscale_all_dim"] == 0.7  # latent attention multiplies its logits by it


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (
            "linear:4",
            "they read every scaling of it as the yarn of DeepSeek, with truncated ends; take yarn or another",
        ),
        ("cope", "they read every scaling of it as the yarn of DeepSeek"),
        ("yarn:4,truncate=false", "they read every scaling of it as the yarn of DeepSeek"),
        ("yarn:4,attention_factor=0.9", "0.9 needs an mscale that is not above 0; take a larger one"),
        ("yarn:1,attention_factor=1.3", "1.3 needs an mscale that is not above 0"),
    ],
)
def test_latent_attention_refuses_what_yarn_cannot_say(spec, words):
    with pytest.raises(ConfigError, match=f"cannot be written for vLLM and SGLang.*{words}"):
        hf_write.write_served(ROPE, parse(spec), yarn_only=True)


@pytest.mark.parametrize("scaler", [Linear(factor=4), YaRN(factor=4), Llama3(factor=4)])
def test_factors_are_written_as_floats(scaler):
    for write in (hf_write.write, hf_write.write_served):
        assert isinstance(write(ROPE, scaler)["factor"], float)
    assert readings(hf_write.write_served(ROPE, scaler))["vLLM"].scaler is not None


@pytest.mark.parametrize("spec", ["dynamic-ntk:4", "dynamic-yarn", "yarn:4|logn", "rerope:512", "temperature:1.1"])
def test_scalers_that_no_server_has_are_refused(spec):
    with pytest.raises(ConfigError, match=r"depends on the length|a model file cannot hold"):
        hf_write.write_served(ROPE, parse(spec))


def test_mlx_reads_either_of_the_old_keys():
    parameters = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}

    for missing, misses in (
        ((), False),
        (("rope_theta",), False),
        (("rope_scaling",), False),
        (("rope_theta", "rope_scaling"), True),
    ):
        content = {key: value for key, value in config(parameters).items() if key not in missing}
        mlx = next(reading for reading in read_all(content) if reading.engine == "mlx-lm")
        assert any("this file does not have" in note for note in mlx.notes) == misses, missing


@pytest.mark.parametrize(("length", "reach"), [(8192, 8192), (1000, 2048)])
def test_a_fixed_scaler_reaches_its_length_and_at_least_the_trained_one(length, reach):
    assert fix_length(parse("dynamic-ntk:4"), ROPE, length).reach(ROPE) == reach


@pytest.mark.parametrize("spec", ["dynamic-ntk:4", "dynamic-yarn", "dynamic-yarn|resonance"])
@pytest.mark.parametrize("rope", [ROPE, RopeSpec(dim=64, base=1e4, trained_length=2048, rotating_pairs=20)])
def test_a_fixed_scaler_has_the_frequencies_of_its_length_at_all_lengths(spec, rope):
    scaler = parse(spec)
    fixed = fix_length(scaler, rope, 8192)
    wanted = scaler.frequencies(rope, 8192)
    for length in (None, 100, 8192, 10**6):
        frequencies = fixed.frequencies(rope, length)
        torch.testing.assert_close(frequencies.inv_freq, wanted.inv_freq, rtol=1e-12, atol=0)
        assert frequencies.attention_factor == wanted.attention_factor
    assert fix_length(parse("yarn:4"), rope, 8192) == parse("yarn:4")


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 2048}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 2048,
    "short_factor": [1.0] * 32,
    "long_factor": [2.0] * 32,
}


PROPORTIONAL = {"rope_type": "proportional", "rope_theta": 1e4, "factor": 4.0}


@pytest.mark.parametrize("parameters", [{"rope_type": "default", "rope_theta": 1e4}, YARN])
def test_plain_and_plain_yarn_are_read_alike_by_all(parameters):
    by_engine = readings(parameters)
    assert {*by_engine} == {*ENGINES}
    for reading in by_engine.values():
        assert same_frequencies(reading, by_engine["transformers"], 8192), reading.engine


@pytest.mark.parametrize(
    ("parameters", "engine", "spec"),
    [
        (YARN | {"attention_factor": 1.3}, "SGLang", "yarn:4"),
        (YARN | {"attention_factor": 1.3}, "llama.cpp", "yarn:4"),
        (YARN | {"attention_factor": 1.3}, "mlx-lm", "yarn:4"),
        (YARN | {"attention_factor": 1.3}, "vLLM", "yarn:4,attention_factor=1.3"),
        (YARN | {"truncate": False}, "llama.cpp", "yarn:4"),
        (YARN | {"factor": 8.0}, "ExLlamaV3", "yarn:4"),
        ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}, "vLLM", "none"),
        ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}, "SGLang", f"base:{1e4 * 13 ** (64 / 62)!r}"),
        (LONG, "llama.cpp", "none"),
        (PROPORTIONAL, "vLLM", "none"),
        (PROPORTIONAL, "SGLang", "none"),
    ],
)
def test_known_disagreements(parameters, engine, spec):
    reading = readings(parameters)[engine]
    wanted = parse(spec).frequencies(ROPE)
    frequencies = reading.frequencies(8192)
    torch.testing.assert_close(frequencies.inv_freq, wanted.inv_freq, rtol=1e-9, atol=0)
    assert frequencies.attention_factor == pytest.approx(wanted.attention_factor, rel=1e-9)
    assert reading.notes or same_frequencies(reading, readings(parameters)["transformers"], 8192)


@pytest.mark.parametrize("engine", ["vLLM", "SGLang", "ExLlamaV3", "mlx-lm"])
def test_longrope_is_selected_once_and_its_m_is_that_of_the_rule(engine):
    reading = readings(LONG | {"attention_factor": 1.5})[engine]
    for length in (100, 8192):  # transformers takes the short factors at 100
        frequencies = reading.frequencies(length)
        torch.testing.assert_close(frequencies.inv_freq, ROPE.theta / 2)
        assert frequencies.attention_factor == pytest.approx(math.sqrt(1 + math.log(4) / math.log(2048)))
    assert any("long factors" in note for note in reading.notes)
    assert any("attention_factor" in note for note in reading.notes)


def test_keys_that_an_engine_does_not_read():
    new_only = readings(YARN, old=False)["mlx-lm"]
    assert new_only.rope.base == 10_000 and str(new_only.scaler) == "none" and "rope_theta" in new_only.notes[0]
    old_only = readings(YARN, new=False)
    assert all(same_frequencies(reading, old_only["transformers"], 8192) for reading in old_only.values())
    whole = readings({"rope_type": "linear", "rope_theta": 1e4, "factor": 4})
    for engine in ("vLLM", "SGLang"):
        assert whole[engine].scaler is None and "decimal point" in whole[engine].notes[0]
    assert whole["SGLang"].max_length == 4 * 8192


def test_a_trained_length_that_only_transformers_adds():
    """mlx-lm takes 4096, and ExLlamaV3 the given factor."""
    by_engine = readings({key: value for key, value in YARN.items() if key != "original_max_position_embeddings"})
    assert by_engine["transformers"].rope.trained_length == 8192
    assert by_engine["mlx-lm"].rope.trained_length == 4096
    assert by_engine["ExLlamaV3"].scaler == YaRN(factor=4)
    assert by_engine["ExLlamaV3"].notes == ()


def test_mscales_that_repeat_the_attention_factor_are_read_and_others_refused():
    repeated = LONG | {"attention_factor": 1.2, "short_mscale": 1.2, "long_mscale": 1.2}
    assert hf.read(config(repeated))[None].scaler.attention_factor == 1.2
    for other in ({"short_mscale": 1.1}, {"attention_factor": 1.1}, {"long_mscale": None}):
        with pytest.raises(Exception, match="a temperature that changes with the length"):
            hf.read(config(repeated | other))


def test_every_reading_is_as_stored():
    """Scalers, lengths and notes, which no other test compares one by one."""
    stored = Path(__file__).with_name("readings.txt").read_text(encoding="utf-8").splitlines()
    assert list(lines()) == stored, "if intended: python tests/scaling/words.py > tests/scaling/readings.txt"
