"""Prompts cut from a text at random places, with the tokens of the uncut text for comparison."""

from __future__ import annotations

import random
import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, islice

from ..errors import DataError
from .vocabulary import Vocabulary

ANYWHERE, AFTER_SPACE, WORD_END, INSIDE = "any character", "after a space", "end of a word", "word border in a token"

_PLACES = {
    ANYWHERE: re.compile(r""),
    AFTER_SPACE: re.compile(r"(?<=\S )(?=\S)"),
    WORD_END: re.compile(r"(?<=\w)(?!\w)"),
    # next to a sign (not in a row of equal signs), before a line end, before a capital in a word, between ideographs
    INSIDE: re.compile(
        r"(?<=([^\w\s]|_))(?!\1)(?=\S)|(?<=[^\W_])(?=[^\w\s]|_)|(?<=\S)(?=\n)|(?<=[a-z])(?=[A-Z])"
        r"|(?<=[\u3400-\u9fff])(?=[\u3400-\u9fff])"
    ),
}
KINDS = tuple(_PLACES)
"""Kinds of places. `INSIDE` cuts are always inside a token of the text, the others can also be between tokens."""

_BEFORE = (200, 400)  # least and most characters of a prompt
_AFTER = 128  # characters of the text after the cut
_TRIES = 400  # most places tried for each cut
_ROUNDS = 20  # most places tried for each character of the text; a place is missed with probability e^-20


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A text of a few hundred characters and a place in it.

    Attributes:
        place: place of the cut in the whole text, in characters.
        prompt: the text before the cut.
        rest: the text after the cut, UTF-8.
        ids: the tokens of the uncut text.
        token: the token of the uncut text with the first byte after the cut.
        overlap: the number of its bytes before the cut; 0 for a cut between tokens.
    """

    place: int
    prompt: str
    rest: bytes
    ids: tuple[int, ...]
    token: bytes
    overlap: int


def draw(vocabulary: Vocabulary, text: str, kind: str, count: int, seed: int) -> list[Cut]:
    """`count` different cuts of a kind at uniformly random places; fewer if the text does not have so many.

    With the same seed, a larger `count` adds cuts and does not change the first ones.

    Args:
        kind: one of `KINDS`.

    Raises:
        DataError: the text is too short to cut.
    """
    tries = min(_TRIES * count, _ROUNDS * len(text))
    return list(islice(_cuts(vocabulary, text, kind, tries, random.Random(seed)), count))


def _cuts(vocabulary: Vocabulary, text: str, kind: str, tries: int, source: random.Random) -> Iterator[Cut]:
    least = _BEFORE[0] + _AFTER
    if len(text) <= least:
        raise DataError(f"the text has {len(text)} characters; cuts need more than {least}")
    seen: set[int] = set()
    for _ in range(tries):
        place = source.randrange(_BEFORE[0], len(text) - _AFTER)
        length = source.randint(*_BEFORE)
        if place in seen or not _PLACES[kind].match(text, place):
            continue
        seen.add(place)
        cut = _cut(vocabulary, text, place, max(0, place - length))
        if cut is not None and (cut.overlap or kind != INSIDE):
            yield cut


def _cut(vocabulary: Vocabulary, text: str, place: int, begin: int) -> Cut | None:
    """The cut at `place` of the text from the first word after `begin`; None if the tokenizer changes the text."""
    space = re.compile(r"\s+").search(text, begin, min(begin + 50, place - 1)) if begin else None
    begin = space.end() if space else begin
    prompt, rest = text[begin:place], text[place : place + _AFTER]
    ids = vocabulary.encode(prompt + rest)
    added = b" " if vocabulary.adds_space else b""
    before = added + prompt.encode()
    if vocabulary.text_bytes(ids) != before + rest.encode():
        return None
    ends = [0, *accumulate(len(vocabulary.tokens[i]) for i in ids)]
    n = bisect_right(ends, len(before))
    return Cut(
        place=place,
        prompt=prompt,
        rest=rest.encode(),
        ids=tuple(ids),
        token=vocabulary.tokens[ids[n - 1]],
        overlap=len(before) - ends[n - 1],
    )
