"""Scalers that a config names: written, read back, and refused."""

import json
import re

import pytest
import torch

from ropewalk.errors import ConfigError, UnsupportedModel
from ropewalk.scaling import hf, parse
from ropewalk.scaling.named_scaler import (
    NamedScaler,
    as_trained,
    check_named,
    names_scaler,
    ropes_of_layers,
    with_named_scaler,
)
from ropewalk.scaling.serving import ENGINES, read_all

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "max_position_embeddings": 512,
    "rope_theta": 1e4,
}
GEMMA = {
    "model_type": "gemma3_text",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "head_dim": 16,
    "num_hidden_layers": 2,
    "max_position_embeddings": 512,
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}


def named(config, spec, length=None):
    configured, local = ropes_of_layers(hf.read(config))
    return NamedScaler(configured=configured, scaler=parse(spec, 512), length=length, local=local)


def written(config, spec, length=None):
    return json.loads(json.dumps(with_named_scaler(config, named(config, spec, length), 4096)))


@pytest.mark.parametrize(
    "config", [LLAMA, {"model_type": "gemma3", "text_config": GEMMA}, GEMMA], ids=["whole", "text", "layers"]
)
@pytest.mark.parametrize(("spec", "length"), [("rerope:0.5x", None), ("dynamic-ntk:4|logn", 2048)])
def test_what_is_named_is_read_back_and_the_config_restored(config, spec, length):
    before = json.dumps(config)
    content = written(config, spec, length)
    assert json.dumps(config) == before
    assert names_scaler(content) and not names_scaler(config)
    assert NamedScaler.read(content) == named(hf.text_content(config), spec, length)
    assert as_trained(content) == config == as_trained(config)


def test_the_keys_that_engines_read():
    assert written(LLAMA, "dynamic-ntk:4|logn", 2048) == {
        **LLAMA,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "ropewalk", "rope_theta": 1e4},
        "rope_scaling": {"rope_type": "ropewalk"},
        "ropewalk_scaler": "dynamic-ntk:4|logn",
        "ropewalk_trained": {"max_position_embeddings": 512, "rope_theta": 1e4},
        "ropewalk_length": 2048,
    }
    assert written(GEMMA, "rerope:256")["rope_parameters"] == {
        "full_attention": {"rope_type": "ropewalk", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "ropewalk", "rope_theta": 1e4},
    }


def test_frequencies_of_the_scaler_of_the_model_and_of_its_windows():
    wide, local = hf.read(GEMMA)["full_attention"], hf.read(GEMMA)["sliding_attention"]
    kept, replaced = named(GEMMA, "logn"), named(GEMMA, "dynamic-ntk:32", 16384)
    assert str(kept.effective) == "linear:8|logn"
    assert torch.equal(kept.frequencies.inv_freq, wide.rope.theta / 8)
    assert torch.equal(replaced.frequencies.inv_freq, parse("dynamic-ntk:32").frequencies(wide.rope, 16384).inv_freq)
    assert torch.equal(kept.window_frequencies.inv_freq, local.rope.theta)
    alone = named(LLAMA, "yarn:4")
    assert torch.equal(alone.window_frequencies.inv_freq, alone.frequencies.inv_freq)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("auto", "'auto' chooses a scaler for every request, and a config names one; name it"),
        ("yarn:4@0", "yarn:4@0 differs by layer, and a config names one scaler for all; take one, or ropewalk.patch"),
        ("dynamic-ntk:4", "depends on the length of the text.*fixed, such as 2k"),
        ("critical-base:100", "length 100 is below the trained length 512"),
    ],
)
def test_scalers_that_no_config_can_name(spec, words):
    with pytest.raises(ConfigError, match=words):
        check_named(parse(spec), hf.read(LLAMA)[None], None)


def test_configs_that_do_not_say_what_they_replaced():
    content = written(LLAMA, "rerope:256")
    for key in ("ropewalk_scaler", "ropewalk_trained"):
        with pytest.raises(ConfigError, match=rf"needs {key}; write it with `ropewalk export MODEL OUT --rope SCALER`"):
            as_trained(content | {key: None})
    with pytest.raises(ConfigError, match="needs ropewalk_scaler and ropewalk_trained"):
        as_trained({"rope_parameters": {"rope_type": "ropewalk"}})
    with pytest.raises(ConfigError, match="ropewalk_trained=4 must hold the keys that were replaced; export the model"):
        as_trained(content | {"ropewalk_trained": 4})
    with pytest.raises(ConfigError, match="ropewalk_length='2k' must be a whole number of tokens"):
        NamedScaler.read(content | {"ropewalk_length": "2k"})
    with pytest.raises(UnsupportedModel, match="the config names the scaler 'rerope:256'"):
        hf.read(content)


def test_kinds_of_layers_that_have_no_named_scaler():
    wide, local = hf.read(GEMMA)["full_attention"], hf.read(GEMMA)["sliding_attention"]
    assert ropes_of_layers({None: wide}) == (wide, None)
    assert ropes_of_layers({"sliding_attention": local, "full_attention": wide}) == (wide, local)
    following = hf.read({**LLAMA, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}})[None]
    for kinds in (
        {"full_attention": wide},
        {"sliding_attention": local},
        {"full_attention": wide, "other_attention": wide, "sliding_attention": local},
        {"full_attention": wide, "sliding_attention": following},
    ):
        listed = ", ".join(f"{kind} ({rope.scaler})" for kind, rope in kinds.items())
        with pytest.raises(UnsupportedModel, match=re.escape(f"at most, one kind with a window, not {listed}")):
            ropes_of_layers(kinds)


def test_engines_that_read_a_named_scaler():
    readings = read_all(written(LLAMA, "dynamic-ntk:4|logn", 2048))
    assert [reading.engine for reading in readings[:2]] == ["vLLM", "transformers"]
    assert sorted(reading.engine for reading in readings) == sorted(ENGINES)
    vllm, transformers, *others = readings
    assert (vllm.label, vllm.max_length) == ("dynamic-ntk:4|logn", 4096)
    assert vllm.notes == (
        "computes it with ropewalk installed beside it, and refuses the config without (docs/export.md)",
        "holds it at a length of 2048 for all texts",
    )
    assert transformers.label == "refuses it" and transformers.max_length is None
    assert "`ropewalk transformers-serve` starts its server with the scaler" in transformers.notes[0]
    for other in others:
        assert (other.label, other.notes) == ("not read", ("has not been read for a named scaler",))
    assert len(read_all(written(LLAMA, "rerope:256"))[0].notes) == 1
