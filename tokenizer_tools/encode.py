"""From text to token ids: the one place where a tokenizer is asked.

Most tokenizers put a start token before a text, and some put an end token behind it. A prompt goes on, so it is never
closed.
"""

from __future__ import annotations

import threading
from typing import Any

from ..errors import UnsupportedModel

__all__ = ["prompt_ids", "start_ids", "text_ids", "texts_ids"]

_PROBES = ("a", "0", ".", " ", "\u4e2d")

_ENCODING = threading.Lock()  # a tokenizer keeps the last call's setting, which another thread's call would change


def prompt_ids(text: str, tokenizer: Any, *, special_tokens: bool = False) -> list[int]:
    """Token ids of a prompt: what the tokenizer puts before a text, and the text. Nothing is put behind it.

    A text that begins with the start token gets no second one.

    Args:
        tokenizer: of transformers or `tokenizers`.
        special_tokens: whether names of special tokens in the text stand for them; else they are ordinary characters.

    Raises:
        UnsupportedModel: as `start_ids`.
    """
    ids, start = text_ids(text, tokenizer, special_tokens=special_tokens), start_ids(tokenizer)
    return ids if start and ids[:1] == start[:1] else [*start, *ids]


def text_ids(text: str, tokenizer: Any, *, special_tokens: bool = False) -> list[int]:
    """Token ids of a text alone, without what the tokenizer puts around it. Arguments as of `prompt_ids`."""
    with _ENCODING:
        ids: list[int] = _ids(text, tokenizer, special_tokens=special_tokens, around=False)
    return ids


def texts_ids(texts: list[str], tokenizer: Any) -> list[list[int]]:
    """`text_ids` of several texts, in one call of a transformers tokenizer."""
    with _ENCODING:
        ids: list[list[int]] = _ids(texts, tokenizer, special_tokens=False, around=False)
    return ids


def start_ids(tokenizer: Any) -> list[int]:
    """The tokens that a tokenizer puts before every text. Those that it puts behind one are not among them.

    Raises:
        UnsupportedModel: what it puts around a text cannot be told from the text.
    """
    asked = getattr(tokenizer, "backend_tokenizer", tokenizer)  # 15 times as fast, and the same
    with _ENCODING:
        around: list[int] = []
        for probe in _PROBES:
            bare, around = (_ids(probe, asked, special_tokens=False, around=flag) for flag in (False, True))
            for n in range(len(around) - len(bare) + 1) if bare else ():
                if around[n : n + len(bare)] == bare:
                    return around[:n]
    if around:
        raise UnsupportedModel(
            f"{getattr(tokenizer, 'name_or_path', '') or type(tokenizer).__name__} puts {around} around a text, but "
            "what comes before it cannot be told from what comes behind; give token ids in the place of text"
        )
    return []


def _ids(text: str | list[str], tokenizer: Any, *, special_tokens: bool, around: bool) -> Any:
    """Token ids of a text, or of each of several for a tokenizer of transformers."""
    if hasattr(tokenizer, "encode_special_tokens"):  # of the `tokenizers` library
        if tokenizer.truncation or tokenizer.padding:  # a prompt is neither cut nor filled up, as under transformers
            tokenizer.no_truncation()
            tokenizer.no_padding()
        tokenizer.encode_special_tokens = not special_tokens
        return tokenizer.encode(text, add_special_tokens=around).ids
    if hasattr(
        getattr(tokenizer, "tokenizer", None), "instruct_tokenizer"
    ):  # of mistral_common: names are never tokens
        return tokenizer(text, add_special_tokens=around).input_ids
    return tokenizer(text, add_special_tokens=around, split_special_tokens=not special_tokens, verbose=False).input_ids
