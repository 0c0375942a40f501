"""Sessions on disk: what is saved continues, a file is complete or absent, and other files are refused."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from live import MORE, TEXT, check_cache, counted, greedy
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaForCausalLM

import ropewalk as rw
from ropewalk.engine import cached_session as module
from ropewalk.engine.model import Model
from ropewalk.engine.runners.choose import RunnerOptions

pytestmark = pytest.mark.usefixtures("untouched")


@pytest.fixture
def saved(model, tmp_path):
    session = model.session()
    session.append(TEXT * 4)
    session.save(tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


@pytest.mark.parametrize("spec", ["none", "yarn:4", "rerope:16|logn", "dynamic-yarn"])
def test_a_saved_session_goes_on_without_reading_again(model, monkeypatch, tmp_path, spec):
    model.rope = spec
    session = model.session()
    session.append(TEXT * 4)
    session.generate("import nump", greedy(4))
    session.save(tmp_path / "s")
    expected = session.generate(MORE, greedy(8, logprobs=1))
    model.rope = "linear:2"
    loaded = model.session(tmp_path / "s")
    model.rope = spec
    with counted(model, monkeypatch) as counts:
        completion = loaded.generate(MORE, greedy(8, logprobs=1))
    assert sum(counts) < 60 < loaded.tokens
    assert (completion.text, completion.token_ids) == (expected.text, expected.token_ids)
    for a, b in zip(completion.logprobs, expected.logprobs, strict=True):
        assert a.logprob == pytest.approx(b.logprob, abs=1e-4)  # a map's keys are rotated again
    assert (loaded.text, loaded._cached.ids) == (session.text, session._cached.ids)


def test_a_loaded_session_is_turned_from_the_scaler_it_was_saved_under(model, tmp_path):
    model.rope = "yarn:4"
    session = model.session()
    session.append(TEXT * 4)
    session.save(tmp_path / "s")
    model.rope = None
    loaded = model.session(tmp_path / "s")
    assert loaded.generate(MORE, greedy(8)) == session.generate(MORE, greedy(8))


@pytest.mark.parametrize("text", ["", "x"])
def test_a_session_without_a_token_is_saved_too(model, tmp_path, text):
    session = model.session()
    session.append(text)
    session.save(tmp_path / "s")
    loaded = model.session(tmp_path / "s")
    assert loaded.text == text
    assert loaded.generate(MORE, greedy()).token_ids == model.generate(text + MORE, greedy()).token_ids


def test_a_fork_is_saved_without_its_parent(model, tmp_path):
    parent = model.session()
    parent.append(TEXT * 4)
    fork = parent.fork()
    fork.crop(20)
    fork.append("é白👍")
    fork.save(tmp_path / "s")
    assert (tmp_path / "s").stat().st_size < 400_000
    check_cache(model, model.session(tmp_path / "s"))


def test_loading_replaces_what_was_there(model, saved):
    session = model.session()
    stream = session.stream(MORE, greedy())
    next(stream)
    session.load(saved)
    assert list(stream) == []
    assert session.text == TEXT * 4
    check_cache(model, session)


# What tells models apart


def fingerprint(model):
    return Model.fingerprint.func(model)


def test_a_session_is_the_models_wherever_it_lies_and_however_it_is_run(model, tiny_folder, tmp_path):
    known = fingerprint(model)
    model.rope = "rerope:16|logn"
    assert fingerprint(model) == known
    model.rope = "yarn:4"
    assert fingerprint(model) == known
    copied = shutil.copytree(tiny_folder, tmp_path / "copy")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        assert fingerprint(rw.load(copied, kv_dtype="bfloat16")) == known
    finally:
        torch.set_num_threads(before)


def other(tiny_folder, change, **config):
    hf = LlamaForCausalLM.from_pretrained(tiny_folder, **config).eval()
    with torch.no_grad():
        change(hf.model.layers[2])
    return Model(hf, AutoTokenizer.from_pretrained(tiny_folder), name="other", options=RunnerOptions(compile=True))


@pytest.mark.parametrize(
    ("change", "config"),
    [
        (lambda layer: layer.mlp.up_proj.weight.mul_(1.01), {}),
        (lambda layer: layer.self_attn.k_proj.weight[:].neg_(), {}),
        (lambda layer: None, {"rms_norm_eps": 1e-5}),
        (lambda layer: None, {"rope_parameters": {"rope_type": "default", "rope_theta": 20000.0}}),
    ],
)
def test_another_models_session_is_refused(tiny_folder, saved, change, config):
    with pytest.raises(rw.DataError, match="was saved by another model than other"):
        other(tiny_folder, change, **config).session(saved)


def test_a_session_under_another_tokenizer_reads_again_what_differs(tiny_folder, saved, tmp_path):
    """Its keys belong to token ids, and those of its text are made anew. So no tokenizer needs to be refused."""
    folder = shutil.copytree(tiny_folder, tmp_path / "other")
    rules = json.loads((folder / "tokenizer.json").read_text())
    del rules["model"]["merges"][100:]
    (folder / "tokenizer.json").write_text(json.dumps(rules))
    other = rw.load(folder, compile=True)
    session = other.session(saved)
    assert session._cached.ids != other.vocabulary.encode(TEXT * 4)[: session.tokens]
    again, whole = session.generate(MORE, greedy(8, logprobs=0)), other.generate(TEXT * 4 + MORE, greedy(8, logprobs=0))
    assert again.text == whole.text
    nats = [[token.logprob for token in answer.logprobs] for answer in (again, whole)]
    assert nats[0] == pytest.approx(nats[1], abs=1e-4)


def test_another_dtype_is_refused(tiny_folder, saved):
    narrow = rw.load(tiny_folder, kv_dtype="bfloat16", compile=True)
    with pytest.raises(rw.DataError, match=r"holds torch.float32 keys, and this model torch.bfloat16; .*kv_dtype"):
        narrow.session(saved)


def test_transformers_modules_go_on_with_a_saved_session(tiny_folder, tmp_path):
    model = rw.load(tiny_folder, compile=False)
    session = model.session()
    session.append(TEXT)
    session.save(tmp_path / "session")
    expected = session.generate(MORE, temperature=0, max_new_tokens=6).text
    loaded = rw.load(tiny_folder, compile=False).session(tmp_path / "session")
    assert loaded.text == TEXT and loaded.tokens > 0
    assert loaded.generate(MORE, temperature=0, max_new_tokens=6).text == expected


@pytest.mark.parametrize("compile", [False, True])
def test_a_session_of_the_other_engine_is_refused(tiny_folder, tmp_path, compile):
    """Under a position map one stores keys rotated and the other un-rotated: the answer was wrong, without a word."""
    writer, reader = (
        rw.load(tiny_folder, "self-extend:4,window=16", compile=which) for which in (compile, not compile)
    )
    session = writer.session()
    session.append(TEXT)
    session.save(tmp_path / "session")
    with pytest.raises(rw.DataError, match=f"rotate keys at another place; load with compile={compile}"):
        reader.session(tmp_path / "session")


# Files that are not sessions


def rewritten(path, **changes):
    """The file with other metadata."""
    with module.safe_open(str(path), framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    header = json.loads(metadata["session"]) | changes
    save_file(tensors, str(path), metadata | {"session": json.dumps(header)})


DAMAGE = {
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-100]), "cannot be read as a session"),
    "beginning only": (lambda path: path.write_bytes(path.read_bytes()[:40]), "cannot be read as a session"),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read as a session"),
    "text": (lambda path: path.write_text(TEXT), "cannot be read as a session"),
    "absent": (lambda path: path.unlink(), "cannot be read as a session"),
    "folder": (lambda path: (path.unlink(), path.mkdir()), "cannot be read as a session"),
    "weights": (lambda path: save_file({"x": torch.ones(2)}, str(path)), "is not a session that ropewalk saved"),
    "format": (
        lambda path: rewritten(path, format="ropewalk chat 3"),
        "is a 'ropewalk chat 3'; give a 'ropewalk session 3'",
    ),
    "version": (  # it does not say which engine wrote its keys
        lambda path: rewritten(path, format="ropewalk session 2"),
        "is a 'ropewalk session 2' of another version of ropewalk, and this one reads 'ropewalk session 3'; read its",
    ),
    "tokens": (lambda path: rewritten(path, ids=[1] * 500), r"holds keys \[.*\] where \[1, 2, 500, 32\] belong"),
    "nested": (
        lambda path: save_file({}, str(path), {"session": "[" * 100_000, "weights": ""}),
        "cannot be read as a session",
    ),
    "json": (lambda path: rewritten(path, ids=None), "cannot be read as a session"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_no_session_is_refused_and_nothing_is_lost(model, saved, damage):
    session = model.session()
    session.append(TEXT)
    before = session.text, list(session._cached.ids), session._cached.cache, session._cached.rope_state
    harm, message = DAMAGE[damage]
    harm(saved)
    with pytest.raises(rw.DataError, match=message):
        session.load(saved)
    with pytest.raises(rw.DataError, match=message):
        model.session(saved)
    assert (session.text, session._cached.ids, session._cached.cache, session._cached.rope_state) == before
    check_cache(model, session)


# Saving is whole or not at all


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
def test_saving_that_fails_leaves_the_old_file(model, monkeypatch, saved, error):
    old, session = saved.read_bytes(), model.session()
    session.append(TEXT)

    def fails(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise error

    monkeypatch.setattr(module, "save_file", fails)
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else rw.DataError
    with pytest.raises(expected, match=r"no space left|^$"):
        session.save(saved)
    assert saved.read_bytes() == old
    assert list(saved.parent.iterdir()) == [saved]
    check_cache(model, session)


@pytest.mark.skipif(os.name != "posix", reason="there are no such modes")
@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_who_may_read_the_file_is_for_the_umask_to_say(model, tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        model.session().save(tmp_path / "s")
    finally:
        os.umask(before)
    assert (tmp_path / "s").stat().st_mode & 0o777 == mode
    assert list(tmp_path.iterdir()) == [tmp_path / "s"]


def test_a_folder_that_is_not_there_is_named(model, tmp_path):
    with pytest.raises(rw.DataError, match=r"nowhere/s cannot be written"):
        model.session().save(tmp_path / "nowhere" / "s")


def test_a_file_is_replaced_when_the_new_one_is_whole(model, saved):
    session = model.session()
    session.append("x = 1\n")
    session.save(saved)
    assert model.session(saved).text == "x = 1\n"
    assert list(saved.parent.iterdir()) == [saved]
