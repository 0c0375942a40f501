"""A long text as overlapping windows that begin and end with sentences."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from sentencex import get_sentence_boundaries

from ..errors import ConfigError
from .encode import texts_ids

_LONGEST = 16  # characters a token, beyond which no window is filled: so a word of megabytes takes no hours


def windows(text: str, tokenizer: Any, tokens: int, overlap: int = 0, *, language: str = "en") -> list[str]:
    """Split `text` into windows, for questions over `contexts`.

        parts = rw.windows(book, model.tokenizer, tokens=2048, overlap=256)
        model.generate("Question: Who is Queequeg?\\nAnswer:", contexts=parts)

    Args:
        tokenizer: of transformers.
        tokens: most tokens of a window.
        overlap: most tokens, in whole sentences, with which a window repeats the end of the one before.
        language: of the text, ISO 639-1: what ends a sentence in it.

    Returns:
        Pieces of the text in order, without the blanks around them. A sentence that is longer than a window is cut
        between words, or inside them where there is no blank. A blank text has none.

    Raises:
        ConfigError: overlap is not below tokens.
    """
    if tokens < 1:
        raise ConfigError(f"tokens {tokens} must be at least 1")
    if not 0 <= overlap < tokens:
        raise ConfigError(f"overlap {overlap} must be at least 0 and below tokens {tokens}")
    pieces = [piece for piece in _pieces(text, tokenizer, tokens, language) if text[slice(*piece[:2])].strip()]
    sizes = [size for _, _, size in pieces]
    found, first, end = [], 0, 0
    while end < len(pieces):
        last = first + max(1, _fitting((sizes[n] for n in range(first, len(sizes))), tokens))
        while last > first + 1 and _size(text[pieces[first][0] : pieces[last - 1][1]], tokenizer) > tokens:
            last -= 1  # some texts take more tokens than their sentences one by one
        if last <= end:  # there is no room for more behind what is repeated
            first += 1
            continue
        found.append(text[pieces[first][0] : pieces[last - 1][1]].strip())
        first, end = max(first + 1, last - _fitting(reversed(sizes[first:last]), overlap)), last
    return found


def _fitting(sizes: Iterable[int], budget: int) -> int:
    """How many of the first sizes make at most `budget` together."""
    return sum(1 for _ in itertools.takewhile(lambda total: total <= budget, itertools.accumulate(sizes)))


def _pieces(text: str, tokenizer: Any, tokens: int, language: str) -> Iterator[tuple[int, int, int]]:
    """Where sentences, or parts of those that are too long, begin and end in `text`, and their tokens."""
    bounds = [(found["start_index"], found["end_index"]) for found in get_sentence_boundaries(language, text)]
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
    """The end of the longest part of text[start:stop] that fits, after a blank if there is one."""
    low, high = start + 1, min(stop, start + _LONGEST * tokens)  # one character is taken, however many tokens it has
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
