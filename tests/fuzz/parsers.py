"""What reads input from outside, with inputs for it. Each takes its input or raises a RopewalkError, nothing else."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import math
import shutil
import string
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from gguf import GGUFWriter, TokenType
from hypothesis import strategies as st
from inputs import deep, json_mutants, mutants, text, written
from transformers import LlamaConfig, LlamaForCausalLM

import ropewalk as rw
from ropewalk.engine import tunings
from ropewalk.engine.checkpoint import read_tokenizer, read_weights
from ropewalk.engine.config import find_config
from ropewalk.engine.gguf import convert_gguf
from ropewalk.engine.gguf_file import GgufFile
from ropewalk.engine.source import load_vocabulary
from ropewalk.evals.data import load_text
from ropewalk.evals.reports.report import environment_of
from ropewalk.evals.reports.table import loss_table
from ropewalk.evals.runs.merge import open_run
from ropewalk.evals.runs.result import Run
from ropewalk.scaling import METHODS, BaseBound, RopeSpec, parse
from ropewalk.scaling.hf import read
from ropewalk.scaling.lengths import format_length, parse_length
from ropewalk.tokenizer_tools.cover import cover
from ropewalk.tokenizer_tools.vocab import Vocabulary

TINY = Path(__file__).parent.parent / "data" / "tiny-llama"
ROPE = RopeSpec(dim=64, base=10_000.0, trained_length=8192)


@dataclass(frozen=True)
class Parser:
    """A parser under test.

    Attributes:
        inputs: a strategy.
        read: reads one of them; raises RopewalkError where it refuses.
        share: how many of 1000 inputs are for it.
    """

    inputs: Callable[[], st.SearchStrategy[Any]]
    read: Callable[[Any], object]
    share: int


# Text

_EXTREMES = ["1e308", "1e-320", "9" * 19, "9" * 400, "9" * 5000, "0." + "1" * 5000]


def _lengths() -> st.SearchStrategy[str]:
    number = st.from_regex(r"-?[0-9]{0,25}[.]?[0-9]{0,8}(e[0-9]{1,5})?", fullmatch=True)
    written = st.builds(str.__add__, number, st.sampled_from(["", "k", "M", "g", "x", "X", " k", "kk", "ＫB", "\0"]))
    hostile = written | st.sampled_from(_EXTREMES) | text(6) | st.text("0123456789.xkMg٣²", max_size=12)
    return _most(_valid_lengths(), hostile)


def _most(valid: st.SearchStrategy[Any], hostile: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Six in ten inputs that are, or may well be, valid: what stands behind a parser is to be reached too."""
    return st.integers(0, 9).flatmap(lambda n: valid if n < 6 else hostile)


def _valid_lengths(most: int = 10**13) -> st.SearchStrategy[str]:
    """Lengths up to about `most`: whole ones in any unit, and fractions of units that are whole numbers of tokens."""
    units = {
        unit: size for unit, size in {"": 1, "k": 1024, "M": 1024**2, "x": 8192, "G": 1024**3}.items() if size <= most
    }

    def one(unit: str) -> st.SearchStrategy[str]:
        size = units[unit]
        whole = st.integers(1, max(1, most // size)).map(str)
        parts = st.integers(1, max(1, 8 * most // size)).map(lambda eighths: f"{eighths / 8:.3f}".rstrip("0"))
        number = whole if size < 8 else whole | parts.map(lambda shown: shown + "0" * shown.endswith("."))
        spelled = st.sampled_from([unit, unit.lower(), unit.upper(), " " + unit])
        return st.builds("{}{}{}".format, st.sampled_from(["", "", " ", "00"]), number, spelled)

    return st.sampled_from(list(units)).flatmap(one)


def _length(value: str) -> None:
    tokens = parse_length(value, 8192)
    assert parse_length(format_length(tokens)) == tokens


def _numbers(low: float, high: float) -> st.SearchStrategy[str]:
    return st.floats(low, high).map(lambda number: f"{number:.4g}") | st.floats(low, high).map(repr)


def _valid_values() -> dict[str, st.SearchStrategy[str]]:
    """Values that a field of this name may have, alone at least; what a plug-in may have is a number."""
    lists = st.lists(_numbers(1, 64), min_size=ROPE.dim // 2, max_size=ROPE.dim // 2).map("/".join)
    flags = st.sampled_from(["true", "false", "True", "0", "1"])
    return {
        "factor": _numbers(1, 128), "b": _numbers(0, 1), "k": _numbers(1, 1000), "base": _numbers(1.5, 1e9),
        "attention_factor": _numbers(0.1, 4), "mscale": _numbers(0.1, 2), "mscale_all_dim": _numbers(0.1, 2),
        "low_freq_factor": _numbers(0.1, 2), "high_freq_factor": _numbers(2.1, 16), "beta_fast": _numbers(8, 64),
        "beta_slow": _numbers(0.1, 4), "truncate": flags, "uniform": flags, "short": lists, "long": lists,
        "group": st.integers(1, 64).map(str), "sinks": st.integers(0, 16).map(str),
        "length": st.sampled_from(["8k", "8192", "1x", "2x", "1.5x", "12k", "16384"]),  # few: each may be searched
    }  # fmt: skip


def _valid_specs() -> st.SearchStrategy[str]:
    """Methods of different facets with fields and values of their own; a few are refused for how values go together."""
    values, facets = _valid_values(), sorted({method.facet for method in METHODS.values() if method.facet})
    short = _valid_lengths(2048)

    @st.composite
    def one(draw: st.DrawFn, names: list[str]) -> str:
        name = draw(st.sampled_from(names))
        fields = dataclasses.fields(METHODS[name])
        chosen = [f for f in fields if f.default is dataclasses.MISSING or draw(st.integers(0, 2)) == 0]
        items = []
        for field in chosen:
            kind = values.get(field.name, short if field.metadata.get("length") else values["factor"])
            items.append((field, draw(kind if draw(st.integers(0, 15)) else st.sampled_from(_EXTREMES))))
        bare = items[:1] if items and items[0][0] is fields[0] and draw(st.booleans()) else []
        named = [f"{field.name}={value}" for field, value in draw(st.permutations(items[len(bare) :]))]
        joined = draw(st.sampled_from([",", ", "])).join([value for _, value in bare] + named)
        shown = draw(st.sampled_from([name, name, name.upper(), f" {name} "]))
        return f"{shown}:{joined}" if joined else shown

    @st.composite
    def several(draw: st.DrawFn) -> str:
        kinds = draw(st.lists(st.sampled_from(facets), min_size=2, max_size=4, unique=True))
        return draw(st.sampled_from(["|", " | "])).join(
            draw(one(sorted(name for name, method in METHODS.items() if method.facet == kind))) for kind in kinds
        )

    return one(sorted(METHODS)) | several()


def _specs() -> st.SearchStrategy[str]:
    fields = sorted({name for method in METHODS.values() for name in method.__dataclass_fields__})
    number = st.from_regex(r"-?[0-9]{1,12}[.]?[0-9]{0,4}(e-?[0-9]{1,4})?", fullmatch=True)
    plain = st.sampled_from(["2", "4", "8.5", "1", "64", "512", "1k"])
    value = (
        plain
        | plain
        | number
        | st.sampled_from(
            ["nan", "inf", "-inf", "1/2/3", "0.5x", "8k", "true", "", "1_0", "٣", "1e999", "\0", *_EXTREMES]
        )
    )
    item = value | st.builds("{}={}".format, st.sampled_from(fields), value)
    method = st.builds(
        lambda name, items: name + (":" + ",".join(items) if items else ""),
        st.sampled_from(sorted(METHODS)),
        st.lists(item, max_size=4),
    )
    own = st.sampled_from(sorted(METHODS)).flatmap(
        lambda name: st.lists(
            st.builds("{}={}".format, st.sampled_from([*METHODS[name].__dataclass_fields__, "factor"]), value),
            max_size=3,
        ).map(lambda items: f"{name}:{','.join(items)}")
    )
    noise = text(4) | st.text(string.printable, max_size=20)
    joined = st.lists(own | method | noise, min_size=2, max_size=3).map("|".join)
    damaged = st.builds(
        lambda spec, at, size, new: spec[: at % (len(spec) + 1)] + new + spec[at % (len(spec) + 1) + size :],
        _valid_specs(), st.integers(0, 200), st.integers(0, 3), value | text(2),
    )  # fmt: skip
    return _most(_valid_specs(), damaged | own | method | joined)


def _spec(value: str) -> None:
    scaler = parse(value, 8192)
    assert parse(str(scaler)) == scaler
    searched = [part.length for part in scaler.parts if isinstance(part, BaseBound)]
    if max(searched, default=0) > 2**15:
        return  # a base that is searched exactly takes time by the length, which is no matter of parsing
    scaler.check(ROPE)
    for length in (None, 100, 16384):
        found = scaler.frequencies(ROPE, length)
        assert found.inv_freq.isfinite().all() and math.isfinite(found.attention_factor)
        assert scaler.bands(ROPE, length)
    assert scaler.logit_factor(torch.tensor([0, 100, 16383]), ROPE).isfinite().all()
    assert scaler.reach(ROPE) > 0 and scaler.growing_step(ROPE) > 0


@functools.cache
def _model() -> Any:
    torch.set_num_threads(1)
    return rw.load(TINY, max_length=4096, compile=False)


def _prompt(value: str) -> None:
    _model().generate(value, rw.SamplingParams(max_new_tokens=1, temperature=0))


def _score(value: str) -> None:
    _model().score(value)


def _covered(value: str) -> None:
    found = cover(_model().vocabulary, value)
    assert _model().vocabulary.text_bytes(list(found.prompt)) == value.encode()


# Configs


@functools.cache
def _configs() -> list[dict[str, Any]]:
    plain = json.loads((TINY / "config.json").read_text())
    length = {"original_max_position_embeddings": 128}
    ropes = [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 2.0, "beta_fast": 32, "beta_slow": 1, "truncate": False, **length},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **length},
        {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0] * 16, "long_factor": [2.0] * 16, **length},
    ]
    older = {key: value for key, value in plain.items() if key != "rope_parameters"}
    families = ["qwen2", "gemma2", "gemma3_text", "phi3", "gpt_neox", "mistral", "cohere", "stablelm", "mixtral"]
    return [
        plain,
        *({**plain, "rope_parameters": {"rope_theta": 10_000.0, **rope}} for rope in ropes),
        {**older, "rope_theta": 10_000.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
        *({**plain, "model_type": family, "partial_rotary_factor": 0.5} for family in families),
    ]


def _config(value: Any) -> None:
    for configured in read(value if isinstance(value, dict) else {}).values():
        if configured.max_length < 10**12:
            configured.scaler.frequencies(configured.rope, configured.max_length)


_WORK = Path(tempfile.mkdtemp(prefix="ropewalk-fuzz-"))


def _folder(**changed: bytes) -> Path:
    """The tiny model with some files changed; a name is given with _ for its dot."""
    folder = _WORK / "model"
    if not folder.exists():
        folder.mkdir()
        for file in TINY.iterdir():
            (folder / file.name).symlink_to(file)
    for name, data in changed.items():
        file = folder / name
        file.unlink(missing_ok=True)
        file.write_bytes(data)
    return folder


def _config_file(value: bytes) -> None:
    find_config(str(_folder(**{"config.json": value})))


# Weights


@functools.cache
def _small() -> Path:
    """A Llama of a few thousand weights: of a megabyte of them a mutant would change nothing that is looked at."""
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(_WORK / "small")
    return _WORK / "small"


@functools.cache
def _header() -> tuple[dict[str, Any], bytes]:
    data = (_small() / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def _safetensors() -> st.SearchStrategy[bytes]:
    header, rest = _header()
    start = len(written(header)).to_bytes(8, "little") + written(header)

    def built(changed: Any) -> bytes:
        return len(written(changed)).to_bytes(8, "little") + written(changed) + rest

    return json_mutants(header).map(built) | mutants(start).map(lambda head: head + rest) | mutants(start + rest)


def _weights(value: bytes) -> None:
    folder = _WORK / "weights"
    if not folder.exists():
        shutil.copytree(_small(), folder)
    (folder / "model.safetensors").unlink()  # what has mapped the last one keeps it
    (folder / "model.safetensors").write_bytes(value)
    read_weights(*find_config(str(folder)), attn_implementation="sdpa")


def _indexes() -> st.SearchStrategy[bytes]:
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(_header()[0], "model-1.safetensors")}
    index["weight_map"].pop("__metadata__", None)
    return json_mutants(index).map(written) | mutants(written(index)) | st.sampled_from(deep())


def _index(value: bytes) -> None:
    folder = _WORK / "sharded"
    if not folder.exists():
        shutil.copytree(_small(), folder)
        (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_bytes(value)
    read_weights(*find_config(str(folder)), attn_implementation="sdpa")


# GGUF


@functools.cache
def _gguf() -> bytes:
    """A small but whole Llama."""
    path = _WORK / "sample.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(10_000.0)
    writer.add_key_value("llama.rope.scaling.type", "linear", _string_type())
    writer.add_float32("llama.rope.scaling.factor", 2.0)
    tokens = ["<s>", "</s>", "<unk>", *string.ascii_lowercase, "Ġ", "ab", "Ġa"]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([int(TokenType.CONTROL)] * 3 + [int(TokenType.NORMAL)] * (len(tokens) - 3))
    writer.add_token_merges(["a b", "Ġ a"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (len(tokens), 32), "output": (len(tokens), 32), "output_norm": (32,)}
    shapes |= {f"blk.0.{name}": (32, 32) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
    shapes |= {f"blk.0.{name}": (32, 32) for name in ("ffn_gate", "ffn_up", "ffn_down")}
    shapes |= {f"blk.0.{name}": (32,) for name in ("attn_norm", "ffn_norm")}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def _string_type() -> Any:
    from gguf import GGUFValueType

    return GGUFValueType.STRING


def _ggufs() -> st.SearchStrategy[bytes]:
    return (
        mutants(_gguf())
        | st.just(_gguf())
        | st.binary(max_size=300)
        | st.binary(max_size=100).map(b"GGUF\3\0\0\0".__add__)
    )


def _gguf_header(value: bytes) -> None:
    file = GgufFile(_written("a.gguf", value))
    _ = file.weights, file.tensors, file.configured


def _gguf_whole(value: bytes) -> None:
    out = _WORK / "converted"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    convert_gguf(_written("b.gguf", value), out)


def _written(name: str, value: bytes) -> Path:
    path = _WORK / name
    path.unlink(missing_ok=True)  # what has mapped the last one keeps it
    path.write_bytes(value)
    return path


# Tokenizers


@functools.cache
def _tokenizers() -> list[Any]:
    from small_tokenizers import KINDS

    return [json.loads(make(alphabet, 0).to_str()) for alphabet, _, make in KINDS.values()]


def _tokenizer_files() -> st.SearchStrategy[bytes]:
    whole = [written(one) for one in _tokenizers()]
    return (
        json_mutants(*_tokenizers()).map(written) | mutants(*whole) | st.binary(max_size=100) | st.sampled_from(deep())
    )


def _tokenizer(value: bytes, name: str = "tokenizer.json") -> None:
    _use(load_vocabulary(_written(name, value)))


def _use(vocabulary: Vocabulary) -> None:
    cover(vocabulary, "a b1 é")
    _ = vocabulary.encode("a b1 é'")


def _tokenizer_folder(value: tuple[bytes, bytes]) -> None:
    folder = _WORK / "tokenizer"
    folder.mkdir(exist_ok=True)
    for name, data in zip(("tokenizer.json", "tokenizer_config.json"), value, strict=True):
        (folder / name).write_bytes(data)
    rw.engine.prompt.Prompt.read("a b", read_tokenizer(str(folder)), _model().vocabulary, "auto")


def _tokenizer_folders() -> st.SearchStrategy[tuple[bytes, bytes]]:
    whole = written(json.loads((TINY / "tokenizer.json").read_text()))
    settings = json.loads((TINY / "tokenizer_config.json").read_text())
    settings["chat_template"] = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}a{% endif %}"
    )
    settings["added_tokens_decoder"] = {"0": {"content": "<|endoftext|>", "special": True}}
    changed = json_mutants(settings).map(written) | mutants(written(settings))
    return st.tuples(st.just(whole), changed) | st.tuples(_tokenizer_files(), st.just(written(settings)))


@functools.cache
def _spm(kind: str) -> bytes:
    model = io.BytesIO()
    lines = ["the quick brown fox", "jumps over the lazy dog", "0 1 2 3 é"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=60 if kind == "unigram" else 310, model_type=kind,
        byte_fallback=kind == "bpe", minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    return model.getvalue()


def _spms() -> st.SearchStrategy[bytes]:
    return mutants(_spm("bpe"), _spm("unigram")) | st.binary(max_size=100)


def _tekkens() -> st.SearchStrategy[bytes]:
    import base64

    pieces = [*([byte] for byte in range(256)), *map(list, (b"ab", b" a", b"the"))]
    vocab = [
        {"rank": rank, "token_bytes": base64.b64encode(bytes(piece)).decode(), "token_str": None}
        for rank, piece in enumerate(pieces)
    ]
    config = {
        "pattern": r"[^\s]+|\s+",
        "num_vocab_tokens": len(vocab),
        "default_vocab_size": len(vocab) + 20,
        "default_num_special_tokens": 20,
        "version": "v3",
    }
    tekken = {"config": config, "vocab": vocab, "multimodal": None}
    return json_mutants(tekken).map(written) | mutants(written(tekken))


# Runs, sessions, tunings, texts


@functools.cache
def _rows() -> list[bytes]:
    file = TINY.parent.parent.parent / "docs" / "results" / "tiny" / "results.jsonl"
    return file.read_bytes().splitlines()[:12]


def _runs() -> st.SearchStrategy[bytes]:
    rows = [json.loads(row) for row in _rows()]
    changed = st.lists(json_mutants(*rows).map(written), min_size=1, max_size=3)
    return changed.map(b"\n".join) | mutants(b"\n".join(_rows()[:3])) | st.binary(max_size=60) | st.sampled_from(deep())


def _run(value: bytes) -> None:
    folder = _WORK / "run"
    folder.mkdir(exist_ok=True)
    (folder / "results.jsonl").write_bytes(value)
    (folder / "env.json").write_bytes(value if len(value) % 2 else b"{}")
    run = open_run(folder)
    for row in run.rows:
        run.losses(row)
    loss_table([row for row in run.rows if row.get("task") == "ppl"])
    environment_of(run)


@functools.cache
def _array() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ones(20, dtype=np.float32))
    return buffer.getvalue()


def _losses(value: bytes) -> None:
    folder = _WORK / "losses-run"
    (folder / "losses").mkdir(parents=True, exist_ok=True)
    (folder / "losses" / "a.npy").write_bytes(value)
    losses = Run(folder).losses({"key": "a"})
    assert losses is None or losses.dtype == np.float32


@functools.cache
def _session_file() -> tuple[dict[str, Any], bytes]:
    model = _compiled()
    session = model.session()
    session.append("import os\n")
    session.save(_WORK / "session")
    data = (_WORK / "session").read_bytes()
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


@functools.cache
def _compiled() -> Any:
    torch.set_num_threads(1)
    return rw.load(TINY, max_length=4096, compile=True)


def _sessions() -> st.SearchStrategy[bytes]:
    outer, rest = _session_file()
    inner = json.loads(outer["__metadata__"]["session"])

    def built(header: Any) -> bytes:
        return len(written(header)).to_bytes(8, "little") + written(header) + rest

    def around(changed: Any) -> bytes:
        return built({**outer, "__metadata__": {**outer["__metadata__"], "session": json.dumps(changed)}})

    return json_mutants(inner).map(around) | json_mutants(outer).map(built) | mutants(built(outer))


def _session(value: bytes) -> None:
    session = _compiled().session(_written("s", value))
    session.generate("x", rw.SamplingParams(max_new_tokens=1, temperature=0))


def _tunings() -> st.SearchStrategy[bytes]:
    entry = {
        "target": 512, "winner": "yarn:2", "simplest": "ntk:2", "servable": None, "loss": 2.5, "text": "kjv",
        "date": "2026-01-01", "ropewalk": "0.1.0",
    }  # fmt: skip
    whole = {"format": "ropewalk tuned 1", "model": "m", "tunings": [entry]}
    return json_mutants(whole).map(written) | mutants(written(whole)) | st.sampled_from(deep())


def _tuning(value: bytes) -> None:
    import os

    os.environ["ROPEWALK_CACHE"] = str(_WORK)
    (_WORK / "tuned").mkdir(exist_ok=True)
    (_WORK / "tuned" / "m.json").write_bytes(value)
    for tuning in tunings.read("m"):
        tuning.as_json()


def _text_file(value: bytes) -> None:
    load_text(_written("a.txt", value))


PARSERS: dict[str, Parser] = {
    "length": Parser(_lengths, _length, 100),
    "spec": Parser(_specs, _spec, 200),
    "config": Parser(lambda: json_mutants(*_configs()), _config, 150),
    "config.json": Parser(
        lambda: json_mutants(*_configs()).map(written) | mutants(*map(written, _configs())) | st.sampled_from(deep()),
        _config_file,
        40,
    ),
    "safetensors": Parser(_safetensors, _weights, 30),
    "safetensors index": Parser(_indexes, _index, 30),
    "GGUF header": Parser(_ggufs, _gguf_header, 100),
    "GGUF conversion": Parser(_ggufs, _gguf_whole, 5),
    "tokenizer.json": Parser(_tokenizer_files, _tokenizer, 70),
    "tokenizer folder": Parser(_tokenizer_folders, _tokenizer_folder, 20),
    "SentencePiece": Parser(_spms, functools.partial(_tokenizer, name="a.model"), 40),
    "tekken": Parser(_tekkens, functools.partial(_tokenizer, name="tekken.json"), 15),
    "prompt": Parser(text, _prompt, 15),
    "score": Parser(text, _score, 15),
    "cover": Parser(text, _covered, 40),
    "results.jsonl": Parser(_runs, _run, 60),
    "losses": Parser(lambda: mutants(_array()) | st.binary(max_size=100), _losses, 20),
    "session": Parser(_sessions, _session, 20),
    "tunings": Parser(_tunings, _tuning, 20),
    "text file": Parser(lambda: mutants("é ü\r\n中\ufeff a\0".encode()) | st.binary(max_size=60), _text_file, 10),
}
