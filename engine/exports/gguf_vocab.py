"""A byte-level BPE tokenizer as the fields of a GGUF file."""

from __future__ import annotations

import json
from typing import Any

from gguf import GGUFWriter, TokenType

from ...errors import UnsupportedModel

__all__ = ["add_vocabulary"]

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_BYTES = {"type": "ByteLevel", "add_prefix_space": False}
_SPLITS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [{**_BYTES, "use_regex": True}],
    "smollm": [{"type": "Digits", "individual_digits": True}, {**_BYTES, "use_regex": True}],
    "llama-bpe": [
        {"type": "Split", "pattern": {"Regex": _LLAMA3}, "behavior": "Isolated", "invert": False},
        {**_BYTES, "use_regex": False},
    ],
}
"""Ways of splitting a text before the merges: llama.cpp's name, and the steps in tokenizer.json."""

_IGNORES_MERGES = {"llama-bpe"}
"""Splits under which llama.cpp takes a piece that is a token as it is, whatever its merges."""


def add_vocabulary(writer: GGUFWriter, tokenizer: Any, size: int, name: str) -> None:
    """Write tokens, merges and special tokens of `tokenizer` into `writer`.

    Args:
        tokenizer: a transformers tokenizer.
        size: rows of the embedding; ids that the tokenizer does not use become unused tokens.
        name: of the model, for errors.

    Raises:
        UnsupportedModel: it is no byte-level BPE, or splits texts in a way that has no name in llama.cpp.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedModel(f"{name}: its tokenizer has no tokenizer.json, so it cannot be written to GGUF")
    described = json.loads(backend.to_str())
    bpe = described["model"]
    split = _split(described, name)
    tokens, types = _tokens(bpe["vocab"], described["added_tokens"], size, name)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in bpe["merges"]])
    for kind, add in (
        ("bos", writer.add_bos_token_id),
        ("eos", writer.add_eos_token_id),
        ("unk", writer.add_unk_token_id),
        ("pad", writer.add_pad_token_id),
    ):
        if (token := getattr(tokenizer, f"{kind}_token_id")) is not None:
            add(token)
    _add_frame(writer, tokenizer, name)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _split(described: dict[str, Any], name: str) -> str:
    """llama.cpp's name for what happens to a text before the merges."""
    bpe, steps = described["model"], described["pre_tokenizer"] or {"type": "none"}
    steps = steps["pretokenizers"] if steps["type"] == "Sequence" else [steps]
    kinds = ", ".join(step["type"] for step in steps)
    plain = not any(bpe.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
    if bpe["type"] != "BPE" or steps[-1]["type"] != "ByteLevel" or not plain:
        raise UnsupportedModel(
            f"{name}: its tokenizer ({bpe['type']} after {kinds}) is not a byte-level BPE, the only kind that is "
            "written to GGUF"
        )
    if described["normalizer"] is not None:
        raise UnsupportedModel(
            f"{name}: its tokenizer normalizes texts ({described['normalizer']['type']}), which GGUF does not say"
        )
    for split, wanted in _SPLITS.items():
        if len(steps) != len(wanted) or bpe.get("ignore_merges", False) != (split in _IGNORES_MERGES):
            continue
        if all(one.items() >= other.items() for one, other in zip(steps, wanted, strict=True)):
            return split
    raise UnsupportedModel(
        f"{name}: its tokenizer splits texts by {kinds} in a way that is none of {', '.join(_SPLITS)}, the ones that "
        "are written to GGUF"
    )


def _tokens(vocab: dict[str, int], added: list[dict[str, Any]], size: int, name: str) -> tuple[list[str], list[int]]:
    """Every token's text and type, by id."""
    highest = max([*vocab.values(), *(token["id"] for token in added)])
    if highest >= size:
        raise UnsupportedModel(f"{name}: its tokenizer has an id {highest}, but its embedding only {size} rows")
    tokens = [f"[unused {index}]" for index in range(size)]
    types = [int(TokenType.UNUSED)] * size
    for text, index in vocab.items():
        tokens[index], types[index] = text, int(TokenType.NORMAL)
    for token in added:
        tokens[token["id"]] = token["content"]
        types[token["id"]] = int(TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED)
    return tokens, types


def _add_frame(writer: GGUFWriter, tokenizer: Any, name: str) -> None:
    """Whether a text begins with the start token and ends with the end token, found on a text."""
    bare = tokenizer("a", add_special_tokens=False).input_ids
    framed = tokenizer("a").input_ids
    starts, ends = (
        token is not None and framed[place] == token != bare[place]
        for token, place in ((tokenizer.bos_token_id, 0), (tokenizer.eos_token_id, -1))
    )
    expected = [tokenizer.bos_token_id] * starts + bare + [tokenizer.eos_token_id] * ends
    if framed != expected:
        raise UnsupportedModel(f"{name}: its tokenizer puts more around a text than a start and an end token")
    writer.add_add_bos_token(starts)
    writer.add_add_eos_token(ends)
