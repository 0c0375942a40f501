"""What prompts are built from: filler sentences, needles between them, random keys and words."""

from __future__ import annotations

import functools
import importlib.metadata
import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import accumulate, cycle, islice
from random import Random
from typing import Literal
from uuid import UUID

from ...errors import ConfigError, DataError, Setting
from ..data import Text

NOISE = ("The grass is green. ", "The sky is blue. ", "The sun is yellow. ", "Here we go. ", "There and back again. ")
"""The filler sentences of the passkey task (arXiv 2305.16300)."""

NOISE_LINE = "".join(NOISE).strip() + "\n"
"""These sentences as one line: a unit of RULER's noise haystack (arXiv 2404.06654)."""

_END = re.compile(r"(?<=[.!?]\s)(?=\S)|(?<=[。！？])|(?<=\n)(?=\S)")


def noise(count: int) -> list[str]:
    """`count` filler sentences."""
    return list(islice(cycle(NOISE), count))


@functools.lru_cache(maxsize=4)
def sentences(text: Text) -> tuple[str, ...]:
    """The sentences of a text with the blanks after them. Lines that are shorter than a sentence
    are units too."""
    whole = "\n".join(text.documents)
    return tuple(part if part[-1].isspace() else f"{part} " for part in _END.split(whole) if part.strip())


@functools.lru_cache(maxsize=4)
def _lowered(text: Text) -> str:
    return "\n".join(text.documents).lower()


def stretch(text: Text, start: int, count: int) -> list[str]:
    """`count` consecutive sentences of a text from sentence `start` on. After the last sentence
    comes the first.

    Raises:
        DataError: the text has fewer sentences.
    """
    units = sentences(text)
    if count > len(units):
        raise DataError(
            f"{text.name} has {len(units)} sentences, and {count} are needed; give a longer ",
            Setting("text", form="name"),
        )
    return [units[(start + index) % len(units)] for index in range(count)]


def drawn_anew(draw: Callable[[], str], taken: Sequence[str], text: Text | None = None) -> str:
    """The first result of `draw()` that does not occur in the text and contains no string of
    `taken`.

    Raises:
        DataError: a thousand draws gave none.
    """
    for _ in range(1000):
        word = draw()
        if not any(known in word for known in taken) and (text is None or word.lower() not in _lowered(text)):
            return word
    name = text.name if text else "the haystack"
    raise DataError(f"{name} contains every key that was drawn; give another ", Setting("text", form="name"))


def boundary(units: Sequence[str], depth: float) -> int:
    """The number of units before the boundary that is nearest to `depth` (0 to 1) of all
    characters.

    Raises:
        ConfigError: the depth is not between 0 and 1.
    """
    if not 0 <= depth <= 1:
        raise ConfigError(f"depth {depth:g} must lie between 0 (the beginning) and 1 (the end)")
    ends = [0, *accumulate(map(len, units))]
    target = depth * ends[-1]
    right = bisect_left(ends, target)
    return right - 1 if right > 0 and target - ends[right - 1] <= ends[right] - target else right


def with_needles(units: Sequence[str], needles: Sequence[tuple[int, str]]) -> tuple[str, list[int]]:
    """Units and needles as one text.

    Args:
        units: the haystack. Each unit ends in a blank.
        needles: for each needle the number of units before it, and its text with the blank after
            it; in the order of the text.

    Returns:
        The text without blanks at its end, and the character at which each needle begins.

    Raises:
        ConfigError: the needles are not in the order of the text, or one is outside it.
    """
    places = [index for index, _ in needles]
    if sorted([0, *places, len(units)]) != [0, *places, len(units)]:
        raise ConfigError(f"needles must be in the order of the text, from 0 to {len(units)} units, not at {places}")
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


WORDS_VERSION = f"wonderwords {importlib.metadata.version('wonderwords')}"
"""The package of the words. Other word lists give other prompts."""


@functools.cache
def _list(kind: str) -> tuple[str, ...]:
    from wonderwords import RandomWord

    return tuple(sorted(set(RandomWord().filter(include_categories=[kind]))))


@functools.cache
def plain_words(kind: Literal["noun", "adjective", "verb"]) -> tuple[str, ...]:
    """The words of one kind that consist of lower-case letters, sorted and without duplicates."""
    return tuple(word for word in _list(kind) if word.isascii() and word.isalpha() and word.islower())


@functools.cache
def all_words() -> tuple[str, ...]:
    """Nouns, adjectives and verbs, sorted and without duplicates."""
    return tuple(sorted({*_list("noun"), *_list("adjective"), *_list("verb")}))


def random_key(random: Random) -> str:
    """An adjective and a noun, such as `quiet-lantern`."""
    return f"{random.choice(_list('adjective'))}-{random.choice(_list('noun'))}"


def random_uuid(random: Random) -> str:
    """A random UUID of version 4."""
    return str(UUID(int=random.getrandbits(128), version=4))
