"""A byte-level BPE tokenizer as the fields of a GGUF file."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import Any

from gguf import GGUFWriter, TokenType

from ...errors import UnsupportedModel
from ..checkpoints.gguf_pretokenizers import PRE_TOKENIZERS
from ..checkpoints.gguf_tokenizer import END_NAMES

__all__ = ["add_vocabulary"]


def add_vocabulary(writer: GGUFWriter, tokenizer: Any, size: int, name: str, ends: Collection[int]) -> None:
    """Write tokens, merges and special tokens of `tokenizer` into `writer`.

    Args:
        tokenizer: a transformers tokenizer.
        size: rows of the embedding; ids that the tokenizer does not use become unused tokens.
        name: the model's name, for errors.
        ends: ids of the tokens that end a text.

    Raises:
        UnsupportedModel: the tokenizer is no byte-level BPE, llama.cpp has no name for its pre-tokenizer, or it has
            more end tokens than a GGUF file can hold.
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
        ("unk", writer.add_unk_token_id),
        ("pad", writer.add_pad_token_id),
    ):
        if (token := getattr(tokenizer, f"{kind}_token_id")) is not None:
            add(token)
    _add_ends(writer, tokens, types, tokenizer.eos_token_id, ends, name)
    _add_frame(writer, tokenizer, name)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _split(described: dict[str, Any], name: str) -> str:
    """llama.cpp's name of the pre-tokenizer, which splits a text before the merges."""
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
            f"{name}: its tokenizer normalizes texts ({described['normalizer']['type']}), and a GGUF file has no field "
            "for that"
        )
    ignore_merges = bool(bpe.get("ignore_merges", False))
    for split, pre in PRE_TOKENIZERS.items():
        if ignore_merges == pre.ignore_merges and _plain(steps) == _plain(pre.steps):
            return split
    raise UnsupportedModel(
        f"{name}: its tokenizer splits texts by {kinds} in a way that has no name in GGUF files"
        + (" together with ignore_merges" if ignore_merges else "")
    )


def _plain(steps: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Pre-tokenizers without the key that changes no token."""
    return [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]


def _add_ends(
    writer: GGUFWriter, tokens: list[str], types: list[int], eos: int | None, ends: Collection[int], name: str
) -> None:
    """Write the tokens that end a text: three by their ids; readers know the others by name."""
    known_by_name = {i for i in ends if tokens[i] in END_NAMES and types[i] == TokenType.CONTROL}
    others = sorted({*ends} - {eos}, key=lambda i: (i in known_by_name, i))
    ids = others if eos is None else [eos, *others]
    for token, add in zip(
        ids, (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id), strict=False
    ):
        add(token)
    if lost := [tokens[i] for i in ids[3:] if i not in known_by_name]:
        raise UnsupportedModel(
            f"{name}: {len(ids)} tokens end its texts, and a GGUF file holds three, so {', '.join(lost)} would be "
            "lost; remove some from generation_config.eos_token_id"
        )


def _tokens(vocab: dict[str, int], added: list[dict[str, Any]], size: int, name: str) -> tuple[list[str], list[int]]:
    """The texts and the types of all tokens, by id."""
    highest = max([*vocab.values(), *(token["id"] for token in added)])
    if highest >= size:
        raise UnsupportedModel(f"{name}: its tokenizer has the id {highest}, and its embedding only {size} rows")
    tokens = [f"[unused {index}]" for index in range(size)]
    types = [int(TokenType.UNUSED)] * size
    for text, index in vocab.items():
        tokens[index], types[index] = text, int(TokenType.NORMAL)
    for token in added:
        tokens[token["id"]] = token["content"]
        types[token["id"]] = int(TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED)
    return tokens, types


def _add_frame(writer: GGUFWriter, tokenizer: Any, name: str) -> None:
    """Write whether the tokenizer adds a start token and an end token to a text. One text is tokenized to see it."""
    bare = tokenizer("a", add_special_tokens=False).input_ids
    framed = tokenizer("a").input_ids
    starts, ends = (
        token is not None and framed[index] == token != bare[index]
        for token, index in ((tokenizer.bos_token_id, 0), (tokenizer.eos_token_id, -1))
    )
    expected = [tokenizer.bos_token_id] * starts + bare + [tokenizer.eos_token_id] * ends
    if framed != expected:
        raise UnsupportedModel(f"{name}: its tokenizer adds more to a text than a start and an end token")
    writer.add_add_bos_token(starts)
    writer.add_add_eos_token(ends)
