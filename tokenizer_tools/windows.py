"""A long text in overlapping windows that start and end at sentences."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from sentencex import get_sentence_boundaries

from ..errors import ConfigError
from .encode import texts_ids
from .vocabulary import check_text

_LONGEST = 16  # most characters of a window for each token, so that a word of megabytes does not take hours


def windows(text: str, tokenizer: Any, tokens: int, overlap: int = 0, *, language: str = "en") -> list[str]:
    """Split `text` into windows, for questions over `contexts`.

        parts = rw.windows(book, model.tokenizer, tokens=2048, overlap=256)
        model.generate("Question: Who is Queequeg?\\nAnswer:", contexts=parts)

    Args:
        tokenizer: a tokenizer of transformers.
        tokens: the most tokens of a window.
        overlap: the most tokens of the previous window that a window repeats, in whole sentences.
        language: ISO 639-1 code of the language, which decides what ends a sentence.

    Returns:
        The windows in the order of the text, without white space around them. A sentence that is longer than a window
        is split between words, or inside a word if there is no space. A blank text has no windows.

    Raises:
        ConfigError: the text is not a string, the tokenizer is none, or overlap is not below tokens.
        DataError: the text has half a surrogate pair.
    """
    check_text(text)
    if not callable(tokenizer):
        raise ConfigError(f"windows needs a tokenizer of transformers, such as model.tokenizer, not {tokenizer!r:.100}")
    if tokens < 1:
        raise ConfigError(f"tokens {tokens} must be at least 1")
    if not 0 <= overlap < tokens:
        raise ConfigError(f"overlap {overlap} must be at least 0 and below tokens {tokens}")
    pieces = [piece for piece in _pieces(text, tokenizer, tokens, language) if text[slice(*piece[:2])].strip()]
    sizes = [size for _, _, size in pieces]
    result, first, end = [], 0, 0
    while end < len(pieces):
        last = first + max(1, _fitting((sizes[n] for n in range(first, len(sizes))), tokens))
        while last > first + 1 and _size(text[pieces[first][0] : pieces[last - 1][1]], tokenizer) > tokens:
            last -= 1  # a text can have more tokens than its sentences together
        if last <= end:  # no new sentence fits after the repeated ones
            first += 1
            continue
        result.append(text[pieces[first][0] : pieces[last - 1][1]].strip())
        first, end = max(first + 1, last - _fitting(reversed(sizes[first:last]), overlap)), last
    return result


def _fitting(sizes: Iterable[int], budget: int) -> int:
    """How many of the first sizes add up to at most `budget`."""
    return sum(1 for _ in itertools.takewhile(lambda total: total <= budget, itertools.accumulate(sizes)))


def _pieces(text: str, tokenizer: Any, tokens: int, language: str) -> Iterator[tuple[int, int, int]]:
    """The start, stop and number of tokens of each sentence of `text`, or of the parts of one that is too long."""
    bounds = [(sentence["start_index"], sentence["end_index"]) for sentence in get_sentence_boundaries(language, text)]
    sizes = _sizes([text[start:stop] for start, stop in bounds], tokenizer)
    for (start, stop), size in zip(bounds, sizes, strict=True):
        if size <= tokens:
            yield start, stop, size
            continue
        while start < stop:
            cut = _cut(text, start, stop, tokenizer, tokens)
            yield start, cut, _size(text[start:cut], tokenizer)
            start = cut


def _cut(text: str, start: int, stop: int, tokenizer: Any, tokens: int) -> int:
    """The end of the longest part of text[start:stop] that fits, after white space if there is any."""
    low, high = start + 1, min(stop, start + _LONGEST * tokens)  # at least one character, with any number of tokens
    while low < high:
        middle = (low + high + 1) // 2
        if _size(text[start:middle], tokenizer) <= tokens:
            low = middle
        else:
            high = middle - 1
    if low == stop:
        return stop
    blank = max(text.rfind(" ", start, low), text.rfind("\n", start, low))
    return blank + 1 if blank > start else low


def _size(text: str, tokenizer: Any) -> int:
    return _sizes([text], tokenizer)[0]


def _sizes(texts: list[str], tokenizer: Any) -> list[int]:
    if not texts:
        return []
    return list(map(len, texts_ids(texts, tokenizer)))
