"""Folders whose config names a scaler: written, read back, changed, and refused where they would be served wrong."""

from __future__ import annotations

import json

import pytest
import torch
from families import FAMILIES
from transformers import AutoConfig, AutoModelForCausalLM

import ropewalk as rw
from ropewalk.scaling import hf
from ropewalk.scaling.named_scaler import LENGTH_KEY, SCALER_KEY, TRAINED_KEY, NamedScaler, ropes_of_layers
from ropewalk.scaling.serving import read_all

TRAINED = 256
SPECS = ["rerope:64|logn", "self-extend:8,window=64|logn", "dual-chunk", "yarn:4|rerope:128", "string:100,window=8"]


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("spec", SPECS)
def test_the_scaler_and_the_trained_embedding_are_read_back(tiny_folder, tmp_path, spec):
    length = None if spec.startswith(("self-extend", "string")) else "4x"
    done = rw.export(tiny_folder, tmp_path / "out", rope=spec, target="vllm", length=length)
    before, content = config_of(tiny_folder), config_of(done.path)
    named = NamedScaler.read(content)
    assert str(named.scaler) == str(rw.parse(spec, TRAINED)) and named.length is None
    assert named.configured == hf.read(before)[None]
    assert content["max_position_embeddings"] == done.length > TRAINED
    assert content[TRAINED_KEY]["rope_parameters"] == before["rope_parameters"]
    assert "plug-in" in done.carrier and f"--max-model-len {done.length}" in done.command


def test_multiples_of_the_trained_length_become_tokens(tiny_folder, tmp_path):
    done = rw.export(tiny_folder, tmp_path / "out", rope="self-extend:8,window=0.25x|logn", target="vllm")
    assert config_of(done.path)[SCALER_KEY] == "self-extend:8,window=64|logn"


def test_a_scaler_that_depends_on_the_length_is_held_at_the_given_one(tiny_folder, tmp_path):
    with pytest.raises(rw.ConfigError, match=r"jet-long:64 depends on the length of the text.*such as 1k"):
        rw.export(tiny_folder, tmp_path / "out", rope="jet-long:64", target="vllm")
    done = rw.export(tiny_folder, tmp_path / "out", rope="jet-long:64", target="vllm", length="4x")
    content = config_of(done.path)
    assert NamedScaler.read(content).length == content[LENGTH_KEY] == 1024
    del content[LENGTH_KEY]
    with pytest.raises(rw.ConfigError, match="depends on the length"):
        NamedScaler.read(content)


def test_the_overrides_of_the_script_turn_the_original_config_into_the_written_one(tiny_folder, tmp_path):
    done = rw.export(tiny_folder, tmp_path / "out", rope="rerope:64|logn", target="vllm", length="4x")
    script = (done.path / "serve.sh").read_text()
    line = next(line for line in script.split("\n") if "--hf-overrides" in line)
    overrides = json.loads(line[line.index("{") : line.rindex("}") + 1])
    assert config_of(tiny_folder) | overrides == config_of(done.path)
    assert "It needs ropewalk" in script


def test_another_scaler_can_take_its_place_by_one_key(tiny_folder, tmp_path):
    done = rw.export(tiny_folder, tmp_path / "out", rope="rerope:64|logn", target="vllm", length="4x")
    named = NamedScaler.read(config_of(done.path) | {SCALER_KEY: "self-extend:8,window=0.5x"})
    assert named.scaler == rw.parse("self-extend:8,window=128")


def test_a_patched_model_is_written_with_its_weights_and_own_scaling(tiny_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    rw.patch(model, "dual-chunk|logn")
    done = rw.export(model, tmp_path / "out", target="vllm", length="4x")
    assert NamedScaler.read(config_of(done.path)).scaler == rw.parse("dual-chunk|logn")


def test_a_model_with_yarn_of_its_own_keeps_it(tiny_folder, tmp_path):
    scaled = rw.export(tiny_folder, tmp_path / "scaled", rope="yarn:4").path
    done = rw.export(scaled, tmp_path / "out", rope="rerope:512", target="vllm", length="4x")
    named = NamedScaler.read(config_of(done.path))
    assert str(named.effective) == "yarn:4|rerope:512" and named.configured.max_length == 4 * TRAINED


def test_static_frequencies_stay_numbers_that_need_no_plug_in(tiny_folder, tmp_path):
    done = rw.export(tiny_folder, tmp_path / "out", rope="yarn:4", target="vllm")
    assert config_of(done.path)["rope_parameters"]["rope_type"] == "yarn" and SCALER_KEY not in config_of(done.path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rope": "rerope:64"}, "reaches any length; give the number of tokens to be served, such as length='4x'"),
        ({"rope": "self-extend:2,window=64", "length": "4x"}, "reaches 448 tokens on this model, fewer than .* 1024"),
        ({"rope": "rerope:256", "length": "4x"}, "window 256 must be below 256"),
        (
            {"rope": "rerope:64", "target": "sglang"},
            "ropewalk installed serve it by name: target='vllm' or target='hf'",
        ),
    ],
)
def test_scalers_that_are_refused(tiny_folder, tmp_path, options, words):
    with pytest.raises(rw.ConfigError, match=words):
        rw.export(tiny_folder, tmp_path / "out", **({"target": "vllm"} | options))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_layers_with_windows_keep_their_own_embedding(tmp_path, family):
    FAMILIES[family]().save_pretrained(tmp_path / "model")
    done = rw.export(tmp_path / "model", tmp_path / "out", rope="rerope:16|logn", target="vllm", length="4x")
    before, content = hf.read(config_of(tmp_path / "model")), config_of(done.path)
    named = NamedScaler.read(content)
    assert (named.configured, named.local) == (
        before.get(None, before.get("full_attention")),
        before.get("sliding_attention"),
    )
    assert "rope_theta" not in content if named.local else content["rope_theta"] == 1e4
    assert read_all(content)[0].label == "rerope:16|logn"


def test_layers_of_three_kinds_are_refused():
    rope = hf.read({"model_type": "llama", "max_position_embeddings": 64})[None]
    with pytest.raises(rw.UnsupportedModel, match=r"at most, one kind with a window, not full_attention \(none\), hy"):
        ropes_of_layers({"full_attention": rope, "hybrid": rope, "sliding_attention": rope})


def test_models_that_the_plug_in_does_not_serve_are_refused(tiny_folder, tmp_path):
    config = config_of(tiny_folder) | {"architectures": ["UnheardOfForCausalLM"]}
    folder = tmp_path / "model"
    folder.mkdir()
    for file in tiny_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(rw.UnsupportedModel, match=r"verified with LlamaForCausalLM.*not with UnheardOfForCausalLM"):
        rw.export(folder, tmp_path / "out", rope="rerope:64", target="vllm", length="4x")


def test_transformers_does_not_run_the_folder_as_if_it_had_no_scaler(tiny_folder, tmp_path):
    done = rw.export(tiny_folder, tmp_path / "out", rope="rerope:64", target="vllm", length="4x")
    with pytest.raises(KeyError, match="ropewalk"):
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(done.path))
    with pytest.raises(rw.UnsupportedModel, match=r"names the scaler 'rerope:64'; ropewalk.load reads"):
        hf.read(config_of(done.path))


def test_ropewalk_loads_the_folder_under_its_scaler(tiny_folder, tmp_path):
    done = rw.export(tiny_folder, tmp_path / "out", rope="self-extend:8,window=64|logn")
    assert done.target == "hf" and done.command.startswith("ropewalk transformers-serve ")
    model, original = rw.load(done.path, dtype="float32"), rw.load(tiny_folder, dtype="float32")
    text = "def add(a, b):\n    return a + b\n" * 40
    assert str(model.rope) == "self-extend:8,window=64|logn" and model.reach == done.length
    original.rope = model.rope
    assert torch.equal(model.score(text).logprobs, original.score(text).logprobs)
    model.rope = original.rope = None
    assert torch.equal(model.score(text[:300]).logprobs, original.score(text[:300]).logprobs)
    assert not rw.load(done.path, rope="none").rope.parts


def test_both_targets_write_the_same_folder_but_for_the_script(tiny_folder, tmp_path):
    for target in ("hf", "vllm"):
        rw.export(tiny_folder, tmp_path / target, rope="rerope:64|logn", length="4x", target=target)
    assert config_of(tmp_path / "hf") == config_of(tmp_path / "vllm")
    names = {target: {file.name for file in (tmp_path / target).iterdir()} for target in ("hf", "vllm")}
    assert names["vllm"] - names["hf"] == {"serve.sh"}


def test_a_named_folder_is_exported_again_from_the_trained_embedding(tiny_folder, tmp_path):
    first = rw.export(tiny_folder, tmp_path / "first", rope="self-extend:8,window=64")
    again = rw.export(first.path, tmp_path / "again", target="vllm")
    assert config_of(again.path) == config_of(first.path)
    static = rw.export(first.path, tmp_path / "static", rope="yarn:4")
    assert config_of(static.path) == config_of(rw.export(tiny_folder, tmp_path / "direct", rope="yarn:4").path)


@pytest.mark.parametrize("key", [SCALER_KEY, TRAINED_KEY])
def test_a_config_without_one_of_the_keys_is_refused(tiny_folder, tmp_path, key):
    done = rw.export(tiny_folder, tmp_path / "out", rope="rerope:64", target="vllm", length="4x")
    content = config_of(done.path)
    del content[key]
    with pytest.raises(rw.ConfigError, match=f"rope type 'ropewalk' needs {key}"):
        NamedScaler.read(content)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((LENGTH_KEY, value) for value in ("8k", 0, -1, True, 1.5)),
        *((TRAINED_KEY, value) for value in (5, [1, 2], "ab")),
        ("max_position_embeddings", None),
    ],
)
def test_a_config_with_an_impossible_value_is_refused(tiny_folder, tmp_path, key, value):
    done = rw.export(tiny_folder, tmp_path / "out", rope="jet-long:64", target="vllm", length="4x")
    with pytest.raises(rw.ConfigError, match=f"{key}="):
        read_all({**config_of(done.path), key: value})


def test_a_text_config_of_null_is_none(tiny_folder, tmp_path):
    done = rw.export(tiny_folder, tmp_path / "out", rope="rerope:64", target="vllm", length="4x")
    for folder in (tiny_folder, done.path):
        content = config_of(folder)
        assert read_all({**content, "text_config": None}) == read_all(content)


def test_explain_says_that_vllm_serves_it_with_the_plug_in_and_transformers_refuses_it(tiny_folder, tmp_path):
    done = rw.export(tiny_folder, tmp_path / "out", rope="jet-long:64", target="vllm", length="4x")
    vllm, transformers, *others = read_all(config_of(done.path))
    assert (vllm.engine, vllm.label, vllm.max_length) == ("vLLM", "jet-long:64", 1024)
    assert "refuses the config without" in vllm.notes[0] and "length of 1024" in vllm.notes[1]
    assert (
        transformers.label == "refuses it"
        and "transformers-serve" in transformers.notes[0]
        and {other.label for other in others} == {"not read"}
    )
