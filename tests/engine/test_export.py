"""Exported models: stock transformers, with the exported config, computes what the scaled model does."""

import json
import os
import shutil
import stat
import struct
import subprocess

import gguf
import pytest
import torch
from carried import STATIC
from families import FAMILIES
from transformers import AutoModelForCausalLM, AutoTokenizer

import ropewalk as rw
from ropewalk.engine.checkpoints.checkpoint import read_config
from ropewalk.engine.checkpoints.gguf_conversion import convert_gguf
from ropewalk.engine.checkpoints.gguf_file import GgufFile
from ropewalk.engine.exports import export
from ropewalk.engine.exports.gguf_write import write_gguf
from ropewalk.scaling import hf
from ropewalk.scaling.spec import parse

TRAINED = 256
IDS = torch.arange(2 * 300).reshape(2, 300) % 1000


def logits(model):
    with torch.inference_mode():
        return model(IDS).logits


@pytest.fixture(scope="module")
def plain(tiny_folder):
    return AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32, attn_implementation="eager")


def stock(folder):
    return logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager"))


def off(ours, theirs):
    """The largest difference, in units of the largest logit."""
    return (ours - theirs).abs().max() / theirs.abs().max()


def patched(model, spec, length=None):
    with rw.patch(model, spec, length=length):
        return logits(model)


@pytest.mark.parametrize("target", ["hf", "vllm"])
@pytest.mark.parametrize("spec", STATIC)
def test_stock_transformers_computes_the_same(plain, tiny_folder, tmp_path, spec, target):
    done = rw.export(tiny_folder, tmp_path / "out", rope=spec, target=target)
    assert off(stock(done.path), patched(plain, spec)) < 1e-5
    assert done.length == json.loads((done.path / "config.json").read_text())["max_position_embeddings"]
    assert done.scaler == parse(spec, TRAINED)


def test_weights_that_are_there_twice_are_copied_once(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "in")
    for name in ("consolidated.safetensors", "original/model.safetensors"):
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(tiny_folder / "model.safetensors", tmp_path / "in" / name)
    rw.export(tmp_path / "in", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").rglob("*.safetensors")] == ["model.safetensors"]


@pytest.mark.parametrize("target", ["hf", "llama.cpp"])
def test_of_the_hub_only_what_is_used_is_fetched(tiny_folder, tmp_path, monkeypatch, target):
    from huggingface_hub.utils import filter_repo_objects

    used = {"model-00001-of-00002.safetensors", "config.json", "tokenizer.json", "README.md"}
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


@pytest.mark.parametrize("spec", ["dynamic-ntk:4", "dynamic-yarn"])
def test_what_follows_the_length_is_held_still_at_one(plain, tiny_folder, tmp_path, spec):
    done = rw.export(tiny_folder, tmp_path / "out", rope=spec, length="4x", target="sglang")
    assert done.length == 4 * TRAINED
    assert off(stock(done.path), patched(plain, spec, length=4 * TRAINED)) < 1e-5
    with pytest.raises(rw.ConfigError, match="in a way that sglang does not; give a length"):
        rw.export(tiny_folder, tmp_path / "other", rope=spec, target="sglang")


def test_transformers_own_dynamic_type_stays_dynamic(tiny_folder, tmp_path):
    done = rw.export(tiny_folder, tmp_path / "out", rope="dynamic-ntk:4")
    config = json.loads((done.path / "config.json").read_text())
    assert config["rope_parameters"]["rope_type"] == "dynamic" and config["max_position_embeddings"] == TRAINED
    assert hf.read(config)[None].scaler == parse("dynamic-ntk:4")


def test_longrope_with_two_lists_promises_its_reach(plain, tiny_folder, tmp_path):
    spec = "longrope:4,short=" + "/".join(["1"] * 16) + ",long=" + "/".join(["3"] * 16)
    done = rw.export(tiny_folder, tmp_path / "out", rope=spec)
    assert done.length == 4 * TRAINED
    assert hf.read(json.loads((done.path / "config.json").read_text()))[None].max_length == 4 * TRAINED
    assert off(stock(done.path), patched(plain, spec, length=4 * TRAINED)) < 1e-5


def test_a_file_that_holds_no_language_model_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "clip")
    writer.add_uint32("clip.vision.block_count", 2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(rw.UnsupportedModel, match=r"no field 'clip\.|no field '\{arch\}"):
        rw.export(tmp_path / "other.gguf", tmp_path / "out.gguf", target="llama.cpp")


def test_models_in_memory_are_written_as_they_are_now(tiny_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    with rw.patch(model, "ntk-mixed:4"):
        wanted = logits(model)
        rw.export(model, tmp_path / "patched", tokenizer=tokenizer)
        assert torch.equal(logits(model), wanted), "the model was changed"
    assert off(stock(tmp_path / "patched"), wanted) < 1e-5
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
        ({"rope": "yarn:4|logn"}, r"'logn' sets the temperature, .* nearest scaler that a config can hold is yarn:4;"),
        ({"rope": "rerope:64"}, r"'rerope' sets the positions, .* nearest scaler that a config can hold is yarn:4;"),
        ({"rope": "self-extend:2,window=64"}, r"nearest scaler that a config can hold is yarn:1\.75;"),
        ({"rope": "auto"}, "'auto' chooses a scaler for every request"),
        ({"rope": "yarn:2", "length": "4x"}, "yarn:2 reaches 512 tokens on this model, fewer than the requested 1k"),
        ({"target": "tgi"}, "unknown target 'tgi'"),
        (
            {"out": "a.gguf"},
            r"a\.gguf is the name of a GGUF file, and target 'hf' writes a folder; take target",
        ),
        ({"out": "a.gguf", "target": "ollama"}, "and target 'ollama' writes a folder"),
        ({"tokenizer": object()}, "tokenizer is an option for a transformers model"),
        ({"dtype": "q8_0"}, "dtype 'q8_0' is for GGUF files; hf keeps the weights"),
        ({"rope": "dynamic-yarn"}, "follows the length of the text"),
    ],
)
def test_what_cannot_be_carried_is_refused(tiny_folder, tmp_path, options, words):
    out = tmp_path / options.pop("out", "out")
    with pytest.raises(rw.ConfigError, match=words):
        rw.export(tiny_folder, out, **options)
    assert not any(tmp_path.iterdir())


def test_nothing_is_overwritten_and_nothing_half_is_left(tiny_folder, tmp_path, monkeypatch):
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


def test_a_gguf_file_needs_a_folder_and_room(tiny_folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(rw.AssetError, match=r"file/x\.gguf: cannot be written \((File exists|Not a directory)\)"):
        rw.export(tiny_folder, tmp_path / "file" / "x.gguf", target="llama.cpp")
    usage = type("Usage", (), {"free": 1_000_000})
    monkeypatch.setattr("ropewalk.engine.storage.shutil.disk_usage", lambda _: usage)
    with pytest.raises(rw.AssetError, match=r"x\.gguf needs \d+ MB of disk space in .*, which has 1 MB free"):
        rw.export(tiny_folder, tmp_path / "x.gguf", target="llama.cpp")


def test_servers_get_a_script_with_the_command_and_the_overrides(tiny_folder, tmp_path):
    for target, words in (("vllm", "vllm serve"), ("sglang", "sglang.launch_server")):
        done = rw.export(tiny_folder, tmp_path / target, rope="ntk-mixed:4", target=target)
        script = done.path / "serve.sh"
        assert script.stat().st_mode & stat.S_IXUSR and words in done.command and " 1024" in done.command
        fake = tmp_path / "bin" / done.command.split()[0]
        fake.parent.mkdir(exist_ok=True)
        fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
        fake.chmod(0o755)
        told = subprocess.run(
            [script, "--port", "1"],
            env={"PATH": f"{fake.parent}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split("\n")
        assert str(done.path) in told and "1024" in told and "--port" in told
        quoted = next(line for line in script.read_text().split("\n") if "rope_parameters" in line)
        overrides = json.loads(quoted[quoted.index("{") : quoted.rindex("}") + 1])
        config = json.loads((done.path / "config.json").read_text())
        assert all(config[key] == value for key, value in overrides.items())


@pytest.mark.parametrize("spec", STATIC)
def test_a_gguf_file_holds_the_frequencies(tiny_folder, tmp_path, spec):
    done = rw.export(tiny_folder, tmp_path / "out.gguf", rope=spec, target="llama.cpp", dtype="f32")
    back = GgufFile(done.path).configured
    wanted = parse(spec, TRAINED).frequencies(hf.read(json.loads((tiny_folder / "config.json").read_text()))[None].rope)
    found = back.scaler.frequencies(back.rope)
    torch.testing.assert_close(found.inv_freq, wanted.inv_freq, rtol=1e-6, atol=1e-30)
    assert found.attention_factor == pytest.approx(wanted.attention_factor, rel=1e-6)
    assert back.max_length == done.length


def test_an_exported_gguf_file_is_the_scaled_model(plain, tiny_folder, tmp_path):
    rw.export(tiny_folder, tmp_path / "out.gguf", rope="ntk-mixed:4", target="llama.cpp", dtype="f32")
    folder = convert_gguf(tmp_path / "out.gguf", tmp_path / "back")
    assert off(stock(folder), patched(plain, "ntk-mixed:4")) < 1e-4


def test_another_gguf_file_keeps_its_quantized_weights_and_fields(tiny_folder, tmp_path):
    first = write_gguf(tiny_folder, tmp_path / "first.gguf", "q8_0")
    second = rw.export(first, tmp_path / "second.gguf", rope="mrrope:4", target="llama.cpp").path
    third = rw.export(second, tmp_path / "third.gguf", target="llama.cpp", length=100).path
    own, other, again = (GgufFile(path) for path in (first, second, third))
    assert {*other.tensors} == {*again.tensors} == {*own.tensors, "rope_freqs.weight"}
    for name, tensor in own.tensors.items():
        for one in (other, again):
            assert one.tensors[name].tensor_type == tensor.tensor_type
            assert (one.tensors[name].data == tensor.data).all(), name
    changed = {"llama.context_length", "GGUF.kv_count", "GGUF.tensor_count"}
    for name in {*own.reader.fields} - changed:
        assert own.field(name) == other.field(name), name
    assert other.field("llama.context_length") == 1024 and again.field("llama.context_length") == 100
    found = [one.configured.scaler.frequencies(one.configured.rope).inv_freq for one in (other, again)]
    assert torch.equal(*found), "the file's own scaling is kept where none is asked for"


def test_empty_arrays_of_a_gguf_file_are_left_out(tiny_folder, tmp_path):
    first = write_gguf(tiny_folder, tmp_path / "first.gguf").read_bytes()
    count = int.from_bytes(first[16:24], "little") + 1
    name = b"some.list"  # gguf would not write it; 64 bytes in all, so that the tensors stay aligned
    name += b"." * (64 - 8 - len(name) - 16)
    empty = len(name).to_bytes(8, "little") + name + struct.pack("<IIQ", 9, 8, 0)
    (tmp_path / "more.gguf").write_bytes(first[:16] + count.to_bytes(8, "little") + empty + first[24:])
    assert GgufFile(tmp_path / "more.gguf").field(name.decode()) == []
    done = rw.export(tmp_path / "more.gguf", tmp_path / "out.gguf", rope="ntk:4", target="llama.cpp")
    assert GgufFile(done.path).field(name.decode()) is None


def test_an_architecture_without_divisors_takes_what_needs_none(tiny_folder, tmp_path):
    path = write_gguf(tiny_folder, tmp_path / "llama.gguf", "f32")
    file = GgufFile(path)
    writer = gguf.GGUFWriter(tmp_path / "qwen2.gguf", "qwen2")
    writer.add_float32("qwen2.rope.scale_linear", 2.0)
    for name in ("context_length", "embedding_length", "attention.head_count", "rope.freq_base"):
        value = file.field(f"llama.{name}")
        kind = gguf.GGUFValueType.FLOAT32 if isinstance(value, float) else gguf.GGUFValueType.UINT32
        writer.add_key_value(f"qwen2.{name}", value, kind)
    writer.add_tensor("token_embd.weight", file.tensors["token_embd.weight"].data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for spec in ("linear:4", "ntk:4", "yarn:4"):
        done = rw.export(tmp_path / "qwen2.gguf", tmp_path / f"{spec[:3]}.gguf", rope=spec, target="llama.cpp")
        assert done.length == 4 * TRAINED
        assert GgufFile(done.path).field("qwen2.rope.scale_linear") is None, "it would slow the positions as well"
    with pytest.raises(rw.UnsupportedModel, match=r"is a qwen2 model, and llama\.cpp is not known to read divisors"):
        rw.export(tmp_path / "qwen2.gguf", tmp_path / "no.gguf", rope="mrrope:4", target="llama.cpp")


def test_ollama_gets_a_modelfile(tiny_folder, tmp_path):
    done = rw.export(tiny_folder, tmp_path / "Tiny", rope="yarn:4", target="ollama", dtype="q8_0")
    assert (done.path / "Modelfile").read_text() == "FROM ./model.gguf\nPARAMETER num_ctx 1024\n"
    assert GgufFile(done.path / "model.gguf").configured.scaler == parse("yarn:4")
    assert done.command.startswith("ollama create tiny -f ")


def test_config_keys_of_older_engines_say_the_same(tiny_folder, tmp_path):
    for spec in ("none", "ntk:4", "yarn:4", "mrrope:4"):
        rw.export(tiny_folder, tmp_path / spec[:3], rope=spec)
        config = json.loads((tmp_path / spec[:3] / "config.json").read_text())
        new = config.pop("rope_parameters")
        assert hf.read(config) == hf.read({**config, "rope_parameters": new, "rope_theta": None, "rope_scaling": None})


NOT_CARRIED = {
    "beam": "sees a sliding window only",
    "codegen": "has no rotary embedding",
    "cohere_compass_text": "sees a sliding window only",
    "deepseek_v4": "its rotary module computes its angles anew in every call, so it is not patched either",
    "gemma4_text": "does not accept the scaled config",
    "gemma4_unified_text": "does not accept the scaled config",
    "gptj": "has no rotary embedding",
    "ministral3": "queries scaled by their position",
    "phimoe": "its rotary module computes its angles anew in every call, so it is not patched either",
    "recurrent_gemma": "max_position_embeddings=None",
    "youtu": "transformers itself does not give it back from its files: other logits, untouched",
}
"""Families of `FAMILIES` that cannot be exported, or not be compared, and why."""


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - NOT_CARRIED.keys()))
def test_every_family_is_carried_to_transformers(family, tmp_path):
    model = FAMILIES[family]()
    ids = torch.arange(60)[None] % 50

    def compute(one):
        with torch.inference_mode():
            return one(ids).logits

    with rw.patch(model, "ntk-mixed:4"):
        wanted = compute(model)
    rw.export(model, tmp_path / "out", rope="ntk-mixed:4")
    back = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, attn_implementation=model.config._attn_implementation
    )
    assert off(compute(back), wanted) < 1e-5


@pytest.mark.parametrize("family", [name for name, why in NOT_CARRIED.items() if not why.startswith(("its", "tr"))])
def test_families_that_cannot_be_carried_say_why(family, tmp_path):
    with pytest.raises(rw.RopewalkError, match=NOT_CARRIED[family]):
        rw.export(FAMILIES[family](), tmp_path / "out", rope="ntk-mixed:4")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("target", ["vllm", "llama.cpp"])
def test_frequencies_for_kinds_of_layers_are_written_for_transformers_alone(tmp_path, target):
    with pytest.raises(rw.UnsupportedModel, match="different frequencies"):
        rw.export(FAMILIES["gemma3_text"](), tmp_path / "no", rope="ntk:4", target=target)
