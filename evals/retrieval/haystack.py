"""Hay: filler in units that each end in a blank, and needles put between them."""

from __future__ import annotations

import functools
import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import accumulate, cycle, islice

from ...errors import DataError
from ..data import Text

NOISE = ("The grass is green. ", "The sky is blue. ", "The sun is yellow. ", "Here we go. ", "There and back again. ")
"""The filler of the passkey task (arXiv 2305.16300), sentence by sentence."""

NOISE_LINE = "".join(NOISE).strip() + "\n"
"""The same as one line: a unit of RULER's noise haystack (arXiv 2404.06654)."""

_END = re.compile(r"(?<=[.!?]\s)(?=\S)|(?<=[。！？])|(?<=\n)(?=\S)")


def noise(count: int) -> list[str]:
    """`count` sentences of noise."""
    return list(islice(cycle(NOISE), count))


@functools.lru_cache(maxsize=4)
def sentences(text: Text) -> tuple[str, ...]:
    """A text in sentences (lines, where lines are shorter), with the blanks that follow each."""
    whole = "\n".join(text.documents)
    return tuple(part if part[-1].isspace() else f"{part} " for part in _END.split(whole) if part.strip())


@functools.lru_cache(maxsize=4)
def _lowered(text: Text) -> str:
    return "\n".join(text.documents).lower()


def stretch(text: Text, start: int, count: int) -> list[str]:
    """`count` sentences of a text from number `start` on, going on from its end to its beginning.

    Raises:
        DataError: the text has fewer.
    """
    units = sentences(text)
    if count > len(units):
        raise DataError(f"{text.name}: {count} sentences needed, {len(units)} there; take a longer --text")
    return [units[(start + index) % len(units)] for index in range(count)]


def drawn_anew(draw: Callable[[], str], taken: Sequence[str], text: Text | None = None) -> str:
    """The first of `draw()`, `draw()`, ... that occurs nowhere in the text and neither is nor holds
    one of `taken`.

    Raises:
        DataError: none of a thousand is new.
    """
    for _ in range(1000):
        word = draw()
        if not any(known in word for known in taken) and (text is None or word.lower() not in _lowered(text)):
            return word
    raise DataError(f"{text.name if text else 'the haystack'} holds every key that was drawn; take another --text")


def boundary(units: Sequence[str], depth: float) -> int:
    """The number of units after which `depth` (0 to 1) of their characters have gone by, to the
    nearest boundary."""
    ends = [0, *accumulate(map(len, units))]
    target = depth * ends[-1]
    right = bisect_left(ends, target)
    return right - 1 if right > 0 and target - ends[right - 1] <= ends[right] - target else right


def with_needles(units: Sequence[str], needles: Sequence[tuple[int, str]]) -> tuple[str, list[int]]:
    """Units and needles as one text.

    Args:
        units: the hay, each unit ending in a blank.
        needles: (units that come before it, the needle with the blank after it), in the order of
            the text.

    Returns:
        The text without blanks at its end, and the character at which each needle begins.
    """
    parts: list[str] = []
    starts, length, used = [], 0, 0
    for index, needle in needles:
        parts += units[used:index]
        length += sum(map(len, units[used:index]))
        starts.append(length)
        parts.append(needle)
        length += len(needle)
        used = index
    return "".join([*parts, *units[used:]]).rstrip(), starts
