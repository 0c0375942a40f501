"""Tokenizer files, and texts that a model is asked about."""

from __future__ import annotations

import base64
import functools
import io
import json
from typing import Any

import sentencepiece
from hypothesis import strategies as st
from inputs import deep, json_mutants, mutants, text, written
from parser import TINY, WORK, Parser, stored, tiny_model
from small_tokenizers import KINDS

import ropewalk as rw
from ropewalk.engine.checkpoints.checkpoint import read_tokenizer
from ropewalk.engine.checkpoints.source import load_vocabulary
from ropewalk.engine.prompt import Prompt
from ropewalk.tokenizer_tools.cover import cover
from ropewalk.tokenizer_tools.vocabulary import Vocabulary


@functools.cache
def _tokenizers() -> list[Any]:
    return [json.loads(make(alphabet, 0).to_str()) for alphabet, _, make in KINDS.values()]


def _tokenizer_files() -> st.SearchStrategy[bytes]:
    whole = [written(one) for one in _tokenizers()]
    return (
        json_mutants(*_tokenizers()).map(written) | mutants(*whole) | st.binary(max_size=100) | st.sampled_from(deep())
    )


def _tokenizer(value: bytes, name: str = "tokenizer.json") -> None:
    _use(load_vocabulary(stored(name, value)))


def _use(vocabulary: Vocabulary) -> None:
    cover(vocabulary, "a b1 é")
    _ = vocabulary.encode("a b1 é'")


def _tokenizer_folder(value: tuple[bytes, bytes]) -> None:
    folder = WORK / "tokenizer"
    folder.mkdir(exist_ok=True)
    for name, data in zip(("tokenizer.json", "tokenizer_config.json"), value, strict=True):
        (folder / name).write_bytes(data)
    Prompt.read("a b", read_tokenizer(str(folder)), tiny_model(compiled=False).vocabulary, "auto")


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
def sentencepiece_file(kind: str) -> bytes:
    model = io.BytesIO()
    lines = ["the quick brown fox", "jumps over the lazy dog", "0 1 2 3 é"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=60 if kind == "unigram" else 310, model_type=kind,
        byte_fallback=kind == "bpe", minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    return model.getvalue()


def _spms() -> st.SearchStrategy[bytes]:
    return mutants(sentencepiece_file("bpe"), sentencepiece_file("unigram")) | st.binary(max_size=100)


def _tekkens() -> st.SearchStrategy[bytes]:
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


def _prompt(value: str) -> None:
    tiny_model(compiled=False).generate(value, rw.SamplingParams(max_new_tokens=1, temperature=0))


def _score(value: str) -> None:
    tiny_model(compiled=False).score(value)


def _covered(value: str) -> None:
    found = cover(tiny_model(compiled=False).vocabulary, value)
    assert tiny_model(compiled=False).vocabulary.text_bytes(list(found.prompt)) == value.encode()


TEXTS: dict[str, Parser] = {
    "tokenizer.json": Parser(_tokenizer_files, _tokenizer, 70),
    "tokenizer folder": Parser(_tokenizer_folders, _tokenizer_folder, 20),
    "SentencePiece": Parser(_spms, functools.partial(_tokenizer, name="a.model"), 40),
    "tekken": Parser(_tekkens, functools.partial(_tokenizer, name="tekken.json"), 15),
    "prompt": Parser(text, _prompt, 15),
    "score": Parser(text, _score, 15),
    "cover": Parser(text, _covered, 40),
}
