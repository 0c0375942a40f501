"""Exported models: stock transformers, with the exported config, computes what the scaled model does."""

import json
import shutil

import pytest
import torch
from exported import TRAINED, logits, patched, relative_difference, stock
from static_specs import STATIC
from transformers import AutoModelForCausalLM, AutoTokenizer

import ropewalk as rw
from ropewalk.engine.checkpoints.checkpoint import read_config
from ropewalk.engine.exports import export
from ropewalk.scaling import hf
from ropewalk.scaling.spec import parse


@pytest.mark.parametrize("target", ["hf", "vllm"])
@pytest.mark.parametrize("spec", STATIC)
def test_stock_transformers_computes_the_same(plain, tiny_folder, tmp_path, spec, target):
    done = rw.export(tiny_folder, tmp_path / "out", rope=spec, target=target)
    assert relative_difference(stock(done.path), patched(plain, spec)) < 1e-5
    assert done.length == json.loads((done.path / "config.json").read_text())["max_position_embeddings"]
    assert done.scaler == parse(spec, TRAINED)


def test_weights_that_exist_twice_are_copied_once(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "in")
    for name in ("consolidated.safetensors", "original/model.safetensors"):
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(tiny_folder / "model.safetensors", tmp_path / "in" / name)
    rw.export(tmp_path / "in", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").rglob("*.safetensors")] == ["model.safetensors"]


@pytest.mark.parametrize("target", ["hf", "llama.cpp"])
def test_only_the_files_that_are_used_are_fetched_from_the_hub(tiny_folder, tmp_path, monkeypatch, target):
    from huggingface_hub.utils import filter_repo_objects

    used = {"model-00001-of-00002.safetensors", "config.json", "tokenizer.json", "README.md"}
    used.add("additional_chat_templates/tool_use.jinja")
    others = {"consolidated.safetensors", "original/model.safetensors", "onnx/config.json", "pytorch_model.bin"}
    fetched = []

    def download(name, **patterns):
        fetched.extend(filter_repo_objects([*used, *others], **patterns))
        return str(tiny_folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr(export, "find_config", lambda name: (name, read_config(str(tiny_folder))))
    rw.export("some/model", tmp_path / "out", target=target)
    assert {*fetched} == used


def test_weights_and_tokenizer_are_the_same_bytes(tiny_folder, tmp_path):
    rw.export(tiny_folder, tmp_path / "out", rope="yarn:4")
    for file in tiny_folder.iterdir():
        if file.name != "config.json":
            assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name
    text = "def f(x):\n    return 1990"
    ids = [AutoTokenizer.from_pretrained(folder)(text).input_ids for folder in (tiny_folder, tmp_path / "out")]
    assert ids[0] == ids[1]


@pytest.mark.parametrize("rope", ["yarn:4", "rerope:64"])
def test_named_chat_templates_arrive(tiny_folder, tmp_path, rope):
    """transformers stores all but the default one in a folder, and takes "tool_use" where tools are given."""
    shutil.copytree(tiny_folder, tmp_path / "in")
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.chat_template = {"default": "plain", "tool_use": "with tools"}
    tokenizer.save_pretrained(tmp_path / "in")
    rw.export(tmp_path / "in", tmp_path / "out", rope=rope, length="4x")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template


@pytest.mark.parametrize("spec", ["dynamic-ntk:4", "dynamic-yarn"])
def test_a_scaler_that_depends_on_the_length_is_fixed_to_one(plain, tiny_folder, tmp_path, spec):
    done = rw.export(tiny_folder, tmp_path / "out", rope=spec, length="4x", target="sglang")
    assert done.length == 4 * TRAINED
    assert relative_difference(stock(done.path), patched(plain, spec, length=4 * TRAINED)) < 1e-5
    with pytest.raises(rw.ConfigError, match="in a way that sglang does not know; give a length"):
        rw.export(tiny_folder, tmp_path / "other", rope=spec, target="sglang")


def test_the_dynamic_type_of_transformers_stays_dynamic(tiny_folder, tmp_path):
    done = rw.export(tiny_folder, tmp_path / "out", rope="dynamic-ntk:4")
    config = json.loads((done.path / "config.json").read_text())
    assert config["rope_parameters"]["rope_type"] == "dynamic" and config["max_position_embeddings"] == TRAINED
    assert hf.read(config)[None].scaler == parse("dynamic-ntk:4")


def test_longrope_with_two_lists_states_its_reach(plain, tiny_folder, tmp_path):
    spec = "longrope:4,short=" + "/".join(["1"] * 16) + ",long=" + "/".join(["3"] * 16)
    done = rw.export(tiny_folder, tmp_path / "out", rope=spec)
    assert done.length == 4 * TRAINED
    assert hf.read(json.loads((done.path / "config.json").read_text()))[None].max_length == 4 * TRAINED
    assert relative_difference(stock(done.path), patched(plain, spec, length=4 * TRAINED)) < 1e-5


def test_models_in_memory_are_written_as_they_are_now(tiny_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    with rw.patch(model, "ntk-mixed:4"):
        wanted = logits(model)
        rw.export(model, tmp_path / "patched", tokenizer=tokenizer)
        assert torch.equal(logits(model), wanted), "the model was changed"
    assert relative_difference(stock(tmp_path / "patched"), wanted) < 1e-5
    assert len(AutoTokenizer.from_pretrained(tmp_path / "patched")) == len(tokenizer)
    loaded = rw.load(tiny_folder, rope="mrrope:4", dtype="float32")
    rw.export(loaded, tmp_path / "loaded", target="vllm")
    assert hf.read(json.loads((tmp_path / "loaded" / "config.json").read_text()))[None].max_length == 4 * TRAINED
    back = rw.load(tmp_path / "loaded", dtype="float32")
    ids = list(range(300))
    torch.testing.assert_close(back.score_ids(ids), loaded.score_ids(ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"rope": "yarn:4|logn", "target": "sglang"},
            r"'logn' sets the temperature, .* nearest scaler that a config can hold is yarn:4;",
        ),
        (
            {"rope": "rerope:64", "target": "sglang"},
            r"'rerope' sets the positions, .* nearest scaler that a config can hold is yarn:4;",
        ),
        (
            {"rope": "self-extend:2,window=64", "target": "sglang"},
            r"nearest scaler that a config can hold is yarn:1\.75;",
        ),
        ({"rope": "auto"}, "'auto' chooses a scaler for every request"),
        ({"rope": "yarn:2", "length": "4x"}, "yarn:2 reaches 512 tokens on this model, fewer than the requested 1k"),
        ({"target": "tgi"}, "unknown target 'tgi'"),
        (
            {"out": "a.gguf"},
            r"a\.gguf is the name of a GGUF file, and target 'hf' writes a folder; take target '",
        ),
        ({"out": "a.gguf", "target": "ollama"}, "and target 'ollama' writes a folder"),
        ({"tokenizer": object()}, "tokenizer is an option for a transformers model"),
        ({"dtype": "q8_0"}, "dtype 'q8_0' is for GGUF files; hf keeps the weights"),
        ({"rope": "dynamic-yarn"}, "depends on the length of the text"),
    ],
)
def test_scalers_and_options_that_are_refused(tiny_folder, tmp_path, options, words):
    out = tmp_path / options.pop("out", "out")
    with pytest.raises(rw.ConfigError, match=words):
        rw.export(tiny_folder, out, **options)
    assert not any(tmp_path.iterdir())


def test_nothing_is_overwritten_and_no_part_is_left_after_an_error(tiny_folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    for target in ("hf", "ollama"):
        with pytest.raises(rw.AssetError, match="exists and is not an empty folder"):
            rw.export(tiny_folder, out, target=target)
    assert [file.name for file in out.iterdir()] == ["mine.txt"]
    (tmp_path / "a.gguf").write_text("keep")
    with pytest.raises(rw.AssetError, match="exists; choose another name"):
        rw.export(tiny_folder, tmp_path / "a.gguf", target="llama.cpp")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ropewalk.engine.exports.hf_folder.shutil.copyfile", full)
    with pytest.raises(rw.AssetError, match="No space left on device"):
        rw.export(tiny_folder, tmp_path / "other")

    def denied(source, _):
        raise PermissionError(13, "Permission denied", str(source))

    monkeypatch.setattr("ropewalk.engine.exports.hf_folder.shutil.copyfile", denied)
    with pytest.raises(rw.AssetError, match=r"tiny-llama/.*: cannot be read \(Permission denied\)"):
        rw.export(tiny_folder, tmp_path / "other")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.gguf", "out"]
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((tiny_folder / "config.json").read_bytes())
    with pytest.raises(rw.AssetError, match=r"has no model\.safetensors"):
        rw.export(bare, tmp_path / "other")


def test_config_keys_of_older_engines_have_the_same_meaning(tiny_folder, tmp_path):
    for spec in ("none", "ntk:4", "yarn:4", "mrrope:4"):
        rw.export(tiny_folder, tmp_path / spec[:3], rope=spec)
        config = json.loads((tmp_path / spec[:3] / "config.json").read_text())
        new = config.pop("rope_parameters")
        assert hf.read(config) == hf.read({**config, "rope_parameters": new, "rope_theta": None, "rope_scaling": None})
