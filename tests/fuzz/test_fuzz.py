"""A little of tests/fuzz/run.py with every change, and each input that it found to be neither read nor refused."""

import base64
import contextlib
import json
import pickle
import shutil
import sys
from collections import Counter

import guided
import numpy as np
import pytest
import tiktoken
from checkpoint_parsers import gguf_file
from example_count import examples
from hypothesis import HealthCheck, Phase, given
from inputs import header
from judge import judge
from parser import TINY, tiny_model
from parsers import PARSERS
from run_parsers import session_file
from small_tokenizers import KINDS
from text_parsers import sentencepiece_file
from tokenizers import Tokenizer

import ropewalk as rw
from ropewalk.engine import tuned_scalers
from ropewalk.engine.checkpoints.gguf_file import GgufFile
from ropewalk.engine.checkpoints.source import load_vocabulary
from ropewalk.evals.runs.result import Run, environment_of, open_run
from ropewalk.scaling import parse
from ropewalk.scaling.hf import read
from ropewalk.scaling.lengths import parse_length
from ropewalk.tokenizer_tools.cover import cover
from ropewalk.tokenizer_tools.vocabularies import vocabulary

SLOW = {"GGUF conversion", "safetensors index"}


@pytest.mark.hypothesis
@pytest.mark.parametrize("name", PARSERS)
def test_input_is_read_or_refused(name):
    parser = PARSERS[name]

    @examples(
        5 if name in SLOW else 30,
        database=None,
        deadline=60_000,  # milliseconds
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(parser.inputs())
    def one(value):
        with contextlib.suppress(rw.RopewalkError):
            parser.read(value)

    one()


def test_a_parser_that_fails_would_be_seen(monkeypatch):
    monkeypatch.setitem(PARSERS, "broken", PARSERS["length"].__class__(PARSERS["length"].inputs, lambda _: 1 / 0, 1))
    with pytest.raises(ZeroDivisionError):
        test_input_is_read_or_refused("broken")


def test_what_counts_as_a_failure_and_is_kept(tmp_path, capsys):
    found = Counter()
    judge(parse_length, tmp_path, "8k", found)
    judge(parse_length, tmp_path, "8kk", found)
    for value in (0, False):
        judge(lambda value: 1 / value, tmp_path / "kept", value, found)
    assert found == {"read": 1, "refused": 1, "failed": 2}
    (kept,) = (tmp_path / "kept").iterdir()
    assert kept.name.startswith("ZeroDivisionError-test_fuzz.py-")
    assert pickle.loads(kept.read_bytes()) == 0
    assert capsys.readouterr().err.count("FAILED ZeroDivisionError") == 1


def test_guided_fuzzing_says_what_it_needs(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["guided.py", "length"])
    monkeypatch.setattr(guided.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install atheris"):
        guided.main()


# What it found


def config(**changes):
    return json.loads((TINY / "config.json").read_text()) | changes


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": {}},
        {"model_type": "qwen2", "num_hidden_layers": 10**12},
        {"model_type": "phi3", "head_dim": 10**30},
        {"model_type": "gpt_neox", "head_dim": float("-inf")},
        {"max_position_embeddings": 10**400},
        {"rope_parameters": {"rope_theta": 10**400, "rope_type": "default"}},
    ],
    ids=lambda changes: list(changes)[-1],
)
def test_numbers_of_a_config_that_cannot_be(changes):
    with pytest.raises(rw.RopewalkError):
        read(config(**changes))


def test_a_scaler_is_a_string():
    with pytest.raises(rw.ConfigError, match="not int"):
        parse(4)


@pytest.mark.parametrize(
    "spec",
    [
        "dynamic-ntk:1e308",
        "dynamic-yarn:beta_fast=1e308",
        "dynamic-yarn:beta_slow=1e-320",
        "yarn:4,beta_fast=1e308",
        "leaky-rerope:1,k=1e308",
        "critical-base:" + "9" * 400,
        "critical-base:" + "9" * 5000,
    ],
    ids=lambda spec: spec[:30],
)
def test_numbers_of_a_spec_that_cannot_be(spec):
    with pytest.raises(rw.ConfigError):
        parse(spec, 8192)


@pytest.mark.parametrize(
    "length", ["9" * 20, "9" * 5000, "0." + "9" * 5000 + "k", "8589934592g"], ids=lambda text: text[:9]
)
def test_a_length_beyond_every_position(length):
    with pytest.raises(rw.ConfigError):
        parse_length(length)


def test_a_gguf_field_that_is_no_text(tmp_path):
    data = gguf_file().replace(b"linear", b"line\xec\xff")
    (tmp_path / "a.gguf").write_bytes(data)
    with pytest.raises(rw.UnsupportedModel, match=r"'llama\.rope\.scaling\.type' is damaged"):
        _ = GgufFile(tmp_path / "a.gguf").configured


@pytest.mark.parametrize("field", ["attention.head_count", "rope.freq_base", "context_length"])
def test_a_gguf_number_that_cannot_be(tmp_path, field):
    data, name = gguf_file(), f"llama.{field}".encode()
    at = data.index(name) + len(name) + 4  # behind the type
    data = data[:at] + b"\0\0\0\0" + data[at + 4 :]
    data = data.replace(b"llama.rope.dimension_count", b"llama.rope.dimension_kount")
    (tmp_path / "a.gguf").write_bytes(data)
    try:
        _ = GgufFile(tmp_path / "a.gguf").configured
    except rw.UnsupportedModel:
        return
    assert field == "rope.freq_base"  # 0 is read as absent


def test_a_gguf_array_that_counts_more_than_the_file_holds(tmp_path):
    data, name = gguf_file(), b"tokenizer.ggml.token_type"
    at = data.index(name) + len(name) + 8  # behind the types of the field and of its items
    rest = data[at + 8 :]
    rest = rest[: len(rest) // 4 * 4]  # whole items: gguf then finds none, and looks for the next
    (tmp_path / "a.gguf").write_bytes(data[:at] + (2**40).to_bytes(8, "little") + rest)
    with pytest.raises(rw.UnsupportedModel, match="the file ends within a field or tensor"):
        GgufFile(tmp_path / "a.gguf")


def test_a_sentencepiece_model_whose_pieces_are_no_text(tmp_path):
    (tmp_path / "a.model").write_bytes(sentencepiece_file("bpe").replace("▁t".encode(), b"\xe2\x96t\xe2", 1))
    with pytest.raises(rw.AssetError, match="is damaged, or not a tokenizer"):
        load_vocabulary(tmp_path / "a.model")


def test_a_tokenizer_that_cuts_characters_though_its_kind_does_not():
    """Byte-level tokens, and no step that makes bytes of a text."""
    described = json.loads(KINDS["cased"][2](KINDS["cased"][0], 0).to_str())
    described["pre_tokenizer"]["pretokenizers"].pop()
    tokens = vocabulary(Tokenizer.from_str(json.dumps(described)))
    with pytest.raises(rw.UnsupportedModel, match="splits characters"):
        cover(tokens, "a b1 é")


@pytest.mark.parametrize("prompt", ["\ud800", "import \udfff", "\udc80"])
def test_half_a_surrogate_pair_is_no_text(prompt):
    model = rw.load(TINY, compile=False)
    for ask in (model.generate, lambda text: list(model.stream(text)), model.score, model.session().append):
        with pytest.raises(rw.DataError, match="half a surrogate pair"):
            ask(prompt)


def test_nul_and_a_very_long_word_are_text():
    model = rw.load(TINY, compile=False)
    params = rw.SamplingParams(max_new_tokens=1, temperature=0)
    assert model.generate("\0\0a\0", params).token_ids
    with pytest.raises(rw.ContextOverflow):
        model.generate("a" * 1_000_000, params)


def run_of(tmp_path, **changes):
    row = {"key": "a", "task": "ppl", "protocol": "fixed-target", "model": "m", "rope": "none", "text": "t"}
    row |= {"dtype": "float32", "context": 128, "loss": 1.0} | changes
    (tmp_path / "results.jsonl").write_text(json.dumps({k: v for k, v in row.items() if v is not None}) + "\n")
    return tmp_path


@pytest.mark.parametrize(
    "changes",
    [
        {"rope": None},
        {"protocol": None},
        {"text": {}},
        {"text": 3},
        {"dtype": None},
        {"context": [0]},
        {"text_sha256": {}},
    ],
    ids=str,
)
def test_a_row_that_no_run_wrote_is_named(tmp_path, changes):
    with pytest.raises(rw.DataError, match=rf"the row 'a' is damaged, '{next(iter(changes))}' is"):
        open_run(run_of(tmp_path, **changes))


@pytest.mark.parametrize("key", ["../../x", "/x", "a" * 300, "", 5])
def test_a_key_names_a_file_of_its_run_and_no_other(tmp_path, key):
    """Merging runs writes the losses under the keys of their rows."""
    with pytest.raises(rw.DataError, match="line 1 is damaged"):
        open_run(run_of(tmp_path, key=key))


def test_json_that_is_nested_deeper_than_a_parser_goes(tmp_path, monkeypatch):
    (tmp_path / "results.jsonl").write_bytes(b"[" * 100_000 + b"\n")
    with pytest.raises(rw.DataError, match="line 1 is damaged"):
        Run(tmp_path)
    monkeypatch.setenv("ROPEWALK_CACHE", str(tmp_path))
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "m.json").write_bytes(b"[" * 100_000)
    with pytest.raises(rw.DataError, match="cannot be read as a file of tuned scalers"):
        tuned_scalers.read("m")
    (tmp_path / "results.jsonl").unlink()
    (tmp_path / "env.json").write_bytes(b"[" * 100_000)
    with pytest.raises(rw.DataError, match=r"env\.json is damaged"):
        environment_of(Run(tmp_path))


@pytest.mark.parametrize("data", [b"\x93NUMPY\x01\x00v\x00{'descr': (\n" + b" " * 107, b"", b"\x93NUMPY"])
def test_losses_whose_header_is_no_python(tmp_path, data):
    (tmp_path / "losses").mkdir()
    (tmp_path / "losses" / "a.npy").write_bytes(data)
    with pytest.raises(rw.DataError, match="delete it and measure the cell again"):
        Run(tmp_path).losses({"key": "a"})


def test_losses_of_another_shape(tmp_path):
    (tmp_path / "losses").mkdir()
    np.save(tmp_path / "losses" / "a.npy", np.ones((2, 2)))
    with pytest.raises(rw.DataError, match="not float32"):
        Run(tmp_path).losses({"key": "a"})


def test_a_tokenizer_beside_the_weights_is_named(tmp_path):
    folder = shutil.copytree(TINY, tmp_path / "model")
    (folder / "tokenizer.json").write_text('{"model": 5}')
    with pytest.raises(rw.AssetError, match="its tokenizer cannot be read"):
        rw.load(folder)


@pytest.mark.parametrize(
    "change",
    [{"text": -0.0}, {"ids": {}}, {"ids": ["x"]}, {"length": "x"}, {"rope": 4}, {"dropped": [0, float("-inf")]}],
    ids=str,
)
def test_a_session_whose_header_is_of_another_kind(tmp_path, change):
    outer, rest = session_file()
    inner = json.loads(outer["__metadata__"]["session"]) | change
    changed = {**outer, "__metadata__": {**outer["__metadata__"], "session": json.dumps(inner)}}
    (tmp_path / "s").write_bytes(header(changed) + rest)
    with pytest.raises(rw.RopewalkError):
        tiny_model(compiled=True).session(tmp_path / "s")


def test_a_tekken_file_that_counts_more_tokens_than_there_are(tmp_path):
    config = {"pattern": ".", "num_vocab_tokens": 10**9, "default_vocab_size": 10**9, "default_num_special_tokens": 9}
    (tmp_path / "tekken.json").write_text(json.dumps({"config": config, "vocab": []}))
    with pytest.raises(rw.AssetError, match="states more than 16777216 tokens"):
        load_vocabulary(tmp_path / "tekken.json")


def test_a_tekken_file_that_keeps_too_few_tokens(tmp_path):
    """One that takes most tokens for special ones is left with some bytes only; tiktoken panics at the others."""
    vocab = [
        {"rank": rank, "token_bytes": base64.b64encode(bytes([rank])).decode(), "token_str": None}
        for rank in range(256)
    ]
    config = {
        "pattern": r"\S+|\s+",
        "num_vocab_tokens": 256,
        "default_vocab_size": 276,
        "default_num_special_tokens": 209,
    }
    config["version"] = "v3"
    (tmp_path / "tekken.json").write_text(json.dumps({"config": config, "vocab": vocab}))
    with pytest.raises(rw.UnsupportedModel, match="has no token for the byte 0x43, nor for 188 others"):
        load_vocabulary(tmp_path / "tekken.json")


def test_a_text_that_the_tokenizers_pattern_gives_up_on():
    """A million spaces before a letter are more than tekken's own pattern can go back over."""
    encoding = tiktoken.Encoding(
        "x",
        pat_str=r"\s+(?!\S)|\s+|\S+",
        mergeable_ranks={bytes([byte]): byte for byte in range(256)},
        special_tokens={},
    )
    assert len(vocabulary(encoding).encode(" " * 1000 + "a")) == 1001
    with pytest.raises(rw.DataError, match="the tokenizer failed on this text of 1,000,001 characters"):
        vocabulary(encoding).encode(" " * 1_000_000 + "a")
