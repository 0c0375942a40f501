"""The base class of retrieval tasks, and what their prompts are made of: filler text, needles, keys."""

from __future__ import annotations

import functools
import importlib.metadata
import re
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, cycle, islice
from random import Random
from typing import Any, ClassVar
from uuid import UUID

from ...errors import DataError
from ..data import Text

FORM = 1
"""Counts changes of any prompt form; part of every recipe, so that rows of two forms are never
taken for one."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """What a prompt is drafted for.

    Args:
        context: tokens that prompt and answer may take together.
        depth: where the needle is wanted, 0 (beginning) to 1 (end); None lets the seed choose.
        text: the haystack, for tasks that use one.
    """

    context: int
    depth: float | None = None
    text: Text | None = None


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A prompt with its right answer.

    Args:
        prompt: ends where the answer begins, not in a blank.
        answers: what a right answer holds.
        target: a right answer as it would be written on from the prompt; its first character is a
            blank.
        needle: the character of `prompt` at which the needle begins; None where several pieces are
            asked for.
    """

    prompt: str
    answers: tuple[str, ...]
    target: str
    needle: int | None = None

    def __post_init__(self) -> None:
        assert not self.prompt[-1].isspace(), f"the prompt ends in a blank: {self.prompt[-40:]!r}"
        assert self.target.startswith(" "), f"the answer must follow after a blank: {self.target!r}"


class Task(ABC):
    """A kind of prompt whose size is counted in units: sentences, lines, pairs or words.

    Attributes:
        name: as in rows and tables.
        new_tokens: tokens that the model may write.
        least: units of the smallest prompt that makes sense.
        has_depth: its needle is put at a depth that is asked for.
    """

    name: str
    new_tokens: ClassVar[int]
    least: ClassVar[int] = 1
    has_depth: ClassVar[bool] = False

    @abstractmethod
    def draft(self, random: Random, units: int, place: Place) -> Draft:
        """A prompt of `units` units. One that is a unit longer has about one unit's tokens more."""

    @abstractmethod
    def mark(self, written: str, answers: Sequence[str]) -> float:
        """How right an answer is, 0 to 1."""

    def most(self, place: Place) -> int | None:
        """Units that there are; None is as many as you like."""
        return None

    @property
    def needs_text(self) -> bool:
        """True if the `Place` for it must have a text."""
        return False

    @property
    def settings(self) -> dict[str, Any]:
        """What its prompts depend on beside `Place` and seed; JSON scalars for the recipe."""
        return {"form": FORM}


def match_all(written: str, answers: Sequence[str]) -> float:
    """RULER's `string_match_all` (arXiv 2404.06654): the share of `answers` that occur anywhere in
    `written`, in upper or lower case."""
    return sum(answer.lower() in written.lower() for answer in answers) / len(answers)


def match_first(written: str, answers: Sequence[str]) -> float:
    """1 if the first word with a digit in `written` is the one answer, else 0.

    Stricter than `match_all`: 123456 is not 12345, and a list of guesses is not an answer.
    """
    (answer,) = answers
    match = re.search(r"[\w-]*\d[\w-]*", written)
    return float(match is not None and match[0].lower() == answer.lower())


def enumerated(words: Sequence[str]) -> str:
    """`a`, or `a, b, and c`."""
    return ", ".join(words[:-1]) + ", and " + words[-1] if len(words) > 1 else words[0]


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


WORDS_VERSION = f"wonderwords {importlib.metadata.version('wonderwords')}"
"""Where the words come from; a change of the lists changes prompts."""


@functools.cache
def _list(kind: str) -> tuple[str, ...]:
    from wonderwords import RandomWord

    return tuple(sorted(set(RandomWord().filter(include_categories=[kind]))))


@functools.cache
def all_words() -> tuple[str, ...]:
    """Nouns, adjectives and verbs, sorted, none of them twice."""
    return tuple(sorted({*_list("noun"), *_list("adjective"), *_list("verb")}))


def random_key(random: Random) -> str:
    """An adjective and a noun, `quiet-lantern`."""
    return f"{random.choice(_list('adjective'))}-{random.choice(_list('noun'))}"


def random_uuid(random: Random) -> str:
    """A version 4 UUID."""
    return str(UUID(int=random.getrandbits(128), version=4))
