"""Text to token ids, without an end token. Only this module calls the tokenizer of a model.

Most tokenizers add a start token before a text, and some add an end token after it. A prompt continues, so it gets no
end token.
"""

from __future__ import annotations

import threading
from typing import Any

from ..errors import UnsupportedModel

__all__ = ["is_mistral", "prompt_ids", "start_ids", "text_ids", "texts_ids"]

_PROBES = ("a", "0", ".", " ", "\u4e2d")

_ENCODING = threading.Lock()  # a call changes settings of the tokenizer, which other threads use


def prompt_ids(text: str, tokenizer: Any, *, special_tokens: bool = False) -> list[int]:
    """The token ids of a prompt: the tokens that the tokenizer adds before a text, and the text.

    No end token is added. A text that starts with the start token gets no second one.

    Args:
        tokenizer: a tokenizer of transformers or `tokenizers`.
        special_tokens: True if names of special tokens in the text mean these tokens; else they are plain text.

    Raises:
        UnsupportedModel: as for `start_ids`.
    """
    ids, start = text_ids(text, tokenizer, special_tokens=special_tokens), start_ids(tokenizer)
    return ids if start and ids[:1] == start[:1] else [*start, *ids]


def text_ids(text: str, tokenizer: Any, *, special_tokens: bool = False) -> list[int]:
    """The token ids of a text alone, without start and end tokens. Arguments as for `prompt_ids`."""
    with _ENCODING:
        ids: list[int] = _ids(text, tokenizer, special_tokens=special_tokens, around=False)
    return ids


def texts_ids(texts: list[str], tokenizer: Any) -> list[list[int]]:
    """`text_ids` for several texts, in one call of a transformers tokenizer."""
    with _ENCODING:
        ids: list[list[int]] = _ids(texts, tokenizer, special_tokens=False, around=False)
    return ids


def start_ids(tokenizer: Any) -> list[int]:
    """The tokens that a tokenizer adds before every text, without those that it adds after it.

    Raises:
        UnsupportedModel: the added tokens cannot be separated from the text.
    """
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)  # 15 times as fast, with the same ids
    with _ENCODING:
        around: list[int] = []
        for probe in _PROBES:
            bare, around = (_ids(probe, backend, special_tokens=False, around=flag) for flag in (False, True))
            for n in range(len(around) - len(bare) + 1) if bare else ():
                if around[n : n + len(bare)] == bare:
                    return around[:n]
    if around:
        raise UnsupportedModel(
            f"{getattr(tokenizer, 'name_or_path', '') or type(tokenizer).__name__} adds {around} around a text, and "
            "it is not clear which of them come before it; give token ids in place of text"
        )
    return []


def is_mistral(tokenizer: Any) -> bool:
    """True for a tokenizer of mistral_common, also inside transformers'."""
    return hasattr(getattr(tokenizer, "tokenizer", None), "instruct_tokenizer")


def _ids(text: str | list[str], tokenizer: Any, *, special_tokens: bool, around: bool) -> Any:
    """The token ids of a text, or with a transformers tokenizer of each of several texts."""
    if hasattr(tokenizer, "encode_special_tokens"):  # of the `tokenizers` library
        if tokenizer.truncation or tokenizer.padding:  # as in transformers, a prompt is neither truncated nor padded
            tokenizer.no_truncation()
            tokenizer.no_padding()
        tokenizer.encode_special_tokens = not special_tokens
        return tokenizer.encode(text, add_special_tokens=around).ids
    if is_mistral(tokenizer):  # names are never tokens
        return tokenizer(text, add_special_tokens=around).input_ids
    return tokenizer(text, add_special_tokens=around, split_special_tokens=not special_tokens, verbose=False).input_ids
