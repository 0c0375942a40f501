"""A loaded model whose config brings a scaling: what it says of itself, and how far it goes."""

import json
import shutil

import pytest
import torch
from decoders import IDS, STEP_LOG
from families import DEFAULT, FAMILIES, SMALL
from serving import TOLERANCE, difference, logits
from transformers import AutoModelForCausalLM, Ministral3Config, Ministral3ForCausalLM

import ropewalk as rw

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}


def with_scaling(tiny_folder, folder, length, **scaling):
    """The tiny model with a scaling written into its config, and `max_position_embeddings` of `length`."""
    shutil.copytree(tiny_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    for key in ("rope_scaling", "rope_parameters"):
        base = (config.pop(key, None) or {}).get("rope_theta", config.get("rope_theta", 10_000.0))
        config.setdefault("rope_theta", base)
    config |= {"max_position_embeddings": length, "rope_scaling": scaling}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("length", [256, 1024])
def test_the_configs_own_yarn_is_described_and_reaches_what_it_reaches(tiny_folder, tmp_path, length):
    model = rw.load(with_scaling(tiny_folder, tmp_path / "own", length, **YARN), compile=False)
    asked = rw.load(tiny_folder, rope="yarn:4", compile=False)
    text = "def main():\n    return 1\n" * 60
    ids = model.vocabulary.encode(text)
    assert torch.allclose(model.score_ids(ids[:600]), asked.score_ids(ids[:600]), rtol=0, atol=1e-3)
    assert model.max_length == asked.max_length == 1024
    words = model.describe()
    assert "none, over the config's own yarn:4" in words
    assert "trained  256 tokens, 1k with the config's own yarn:4" in words
    assert ("max_position_embeddings stays at 256" in words) == (length == 256)
    model.rope = "yarn:8"
    assert "yarn:8, in place of the config's own yarn:4" in model.describe()
    model.rope = "rerope:64"
    assert "rerope:64, over the config's own yarn:4" in model.describe()
    with rw.patch(rw.load(tmp_path / "own", compile=False).hf, "none") as handle:
        assert handle.reach == 1024
        assert "1k with the config's own yarn:4" in handle.describe()


PAIRS = 16
OTHERS = {
    "linear": ({"rope_type": "linear", "factor": 4.0}, 256, "not stated"),
    "linear, stated": (
        {"rope_type": "linear", "factor": 4.0, "original_max_position_embeddings": 256},
        1024,
        "stays at",
    ),
    "dynamic": ({"rope_type": "dynamic", "factor": 4.0}, None, "growing from max_position_embeddings"),
    "llama3": (
        {**YARN, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        1024,
        "4 times 256; max_position_embeddings stays at 256",
    ),
    "longrope": (
        {**YARN, "rope_type": "longrope", "short_factor": [1.0] * PAIRS, "long_factor": [3.0] * PAIRS},
        1024,
        "4 times 256; max_position_embeddings stays at 256",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_each_kind_reaches_is_said(tiny_folder, tmp_path, name):
    scaling, reach, words = OTHERS[name]
    model = rw.load(with_scaling(tiny_folder, tmp_path / "own", 256, **scaling), compile=False)
    text = model.describe()
    assert words in text
    assert ("any length" if reach is None else f"reach    {'1k' if reach == 1024 else reach} tokens") in text
    if reach is not None:
        assert model.max_length == reach


@pytest.mark.parametrize(("stated", "reach"), [(True, 1024), (False, 256)])
def test_a_gguf_file_with_linear_scaling(tiny_folder, tmp_path, monkeypatch, stated, reach):
    monkeypatch.setenv("ROPEWALK_CACHE", str(tmp_path / "cache"))
    scaling = {"rope_type": "linear", "factor": 4.0}
    folder = with_scaling(tiny_folder, tmp_path / "own", 256, **scaling)
    rw.export(folder, tmp_path / "out.gguf", target="llama.cpp")
    if stated:
        from ropewalk.engine.checkpoints.gguf_file import GgufFile
        from ropewalk.engine.exports.gguf_write import rewrite_gguf
        from ropewalk.scaling.gguf_rope import GgufRope

        opened = GgufFile(tmp_path / "out.gguf")
        rope = GgufRope(
            dim=opened.rope.dim,
            base=opened.rope.base,
            scaling={"type": "linear", "factor": 4.0, "original_context_length": 256},
        )
        rewrite_gguf(opened, tmp_path / "stated.gguf", rope, 256)
    model = rw.load(tmp_path / ("stated.gguf" if stated else "out.gguf"), compile=False)
    assert model.max_length == reach
    assert ("not stated" in model.describe()) != stated


def test_multiples_and_exports_count_from_what_is_carried(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("ROPEWALK_CACHE", str(tmp_path / "cache"))
    folder = with_scaling(tiny_folder, tmp_path / "own", 256, **YARN)
    assert rw.load(folder, compile=False).trained_length == 1024
    done = rw.export(folder, tmp_path / "out")
    assert done.length == 1024
    assert json.loads((tmp_path / "out" / "config.json").read_text())["max_position_embeddings"] == 1024
    gguf = rw.export(tiny_folder, tmp_path / "a.gguf", rope="yarn:4", length=256, target="llama.cpp")
    assert rw.load(gguf.path, compile=False).max_length == 1024


@pytest.mark.parametrize("target", ["hf", "vllm"])
@pytest.mark.parametrize("spec", ["yarn:4", "yarn:4,attention_factor=1.1", "linear:4", "llama3:factor=8", "ntk:4"])
def test_a_config_that_takes_longrope_alone_carries_every_static_scaler(tmp_path, spec, target):
    """Phi-3 reads yarn as longrope and refuses other types."""
    model = FAMILIES["phi3"]()
    model.save_pretrained(tmp_path / "own")
    rw.export(tmp_path / "own", tmp_path / "out", rope=spec, target=target)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with rw.patch(model, spec):
        assert difference(logits(exported), logits(model)) < TOLERANCE


@pytest.mark.parametrize("trained", [64, 32])
def test_a_trained_length_outside_of_rope_parameters_is_kept_there(tmp_path, trained):
    """Phi-3's config class says 4096 where its file says nothing, over what rope_parameters say."""
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "attention_factor": 1.1}
    model = FAMILIES["phi3"](rope_parameters=DEFAULT)
    model.config.rope_parameters = {**model.config.rope_parameters, **rope, "original_max_position_embeddings": trained}
    model.config.original_max_position_embeddings, model.config.max_position_embeddings = trained, 128
    model.save_pretrained(tmp_path / "own")
    rw.export(tmp_path / "own", tmp_path / "out")
    own, out = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("own", "out"))
    for length in (trained, trained + 1):
        ids = torch.arange(1, length + 1)[None] % 96
        assert difference(logits(out, ids), logits(own, ids)) < TOLERANCE


def test_a_temperature_of_the_models_own(tiny_folder, tmp_path):
    """A small Ministral 3, loaded from a folder, and exported with another scaler."""
    vocabulary = json.loads((tiny_folder / "config.json").read_text())["vocab_size"]
    fields = {**SMALL, "vocab_size": vocabulary, "max_position_embeddings": 256, "rope_parameters": {**STEP_LOG}}
    torch.manual_seed(0)
    hf = Ministral3ForCausalLM(Ministral3Config(**fields)).eval()
    hf.save_pretrained(tmp_path / "model")
    for file in tiny_folder.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "model")
    model = rw.load(tmp_path / "model", compile=True)
    assert "temperature  step-log:0.5,length=64, the model's own" in model.describe()
    assert "step-log:0.5,length=64, the model's own" in rw.patch(hf, "none").describe()
    ids = IDS[0].tolist()
    scores = logits(hf, torch.tensor([ids])).log_softmax(-1)[0, :-1].gather(1, torch.tensor(ids[1:])[:, None])
    assert torch.allclose(torch.as_tensor(model.score_ids(ids)).float(), scores[:, 0], rtol=0, atol=1e-4)
    rw.export(tmp_path / "model", tmp_path / "out", rope="yarn:8")
    served = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    model.rope = "yarn:8"
    scores = logits(served, torch.tensor([ids])).log_softmax(-1)[0, :-1].gather(1, torch.tensor(ids[1:])[:, None])
    assert torch.allclose(torch.as_tensor(model.score_ids(ids)).float(), scores[:, 0], rtol=0, atol=1e-4)
