"""The base class of retrieval tasks, and what their prompts are built from: filler, needles, words."""

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
"""Version of the prompts' wording. It is part of every recipe, so that rows of two versions never
count as the same."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """The length, depth and haystack that a prompt is drafted for.

    Args:
        context: tokens of prompt and answer together, at most.
        depth: the requested position of the needle, 0 (beginning) to 1 (end). None: the seed
            chooses.
        text: the haystack, for tasks that use one.
    """

    context: int
    depth: float | None = None
    text: Text | None = None


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A prompt with its right answer.

    Args:
        prompt: ends where the answer begins, without a trailing blank.
        answers: the strings that a right answer contains.
        target: a right answer as the text after the prompt. Its first character is a blank.
        needle: the character of `prompt` at which the needle begins. None if several needles are
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
    """A kind of prompt. Its size is counted in units: sentences, lines, pairs or words.

    Attributes:
        name: the name in rows and tables.
        new_tokens: tokens that the model may write.
        least: units of the smallest prompt.
        has_depth: True if the needle is put at a requested depth.
    """

    name: str
    new_tokens: ClassVar[int]
    least: ClassVar[int] = 1
    has_depth: ClassVar[bool] = False

    @abstractmethod
    def draft(self, random: Random, units: int, place: Place) -> Draft:
        """A prompt of `units` units. One more unit makes the prompt longer by about the tokens of a
        unit."""

    @abstractmethod
    def mark(self, written: str, answers: Sequence[str]) -> float:
        """How right an answer is, 0 to 1."""

    def most(self, place: Place) -> int | None:
        """The largest possible number of units. None: there is no limit."""
        return None

    @property
    def needs_text(self) -> bool:
        """True if its `Place` must have a text."""
        return False

    @property
    def settings(self) -> dict[str, Any]:
        """What its prompts depend on besides `Place` and seed: JSON scalars, which become part of
        the recipe."""
        return {"form": FORM}


def match_all(written: str, answers: Sequence[str]) -> float:
    """RULER's `string_match_all` (arXiv 2404.06654): the share of `answers` that occur in
    `written`.

    Upper and lower case are the same.
    """
    return sum(answer.lower() in written.lower() for answer in answers) / len(answers)


def match_first(written: str, answers: Sequence[str]) -> float:
    """1 if the first word with a digit in `written` is the only answer, else 0.

    It is stricter than `match_all`: 123456 is not 12345, and a list of guesses is not an answer.
    """
    (answer,) = answers
    match = re.search(r"[\w-]*\d[\w-]*", written)
    return float(match is not None and match[0].lower() == answer.lower())


def enumerated(words: Sequence[str]) -> str:
    """`a`, or `a, b, and c`."""
    return ", ".join(words[:-1]) + ", and " + words[-1] if len(words) > 1 else words[0]


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
        raise DataError(f"{text.name} has {len(units)} sentences, and {count} are needed; give a longer --text")
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
    raise DataError(f"{text.name if text else 'the haystack'} contains every key that was drawn; give another --text")


def boundary(units: Sequence[str], depth: float) -> int:
    """The number of units before the boundary that is nearest to `depth` (0 to 1) of all
    characters."""
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
"""The package of the words. Other word lists give other prompts."""


@functools.cache
def _list(kind: str) -> tuple[str, ...]:
    from wonderwords import RandomWord

    return tuple(sorted(set(RandomWord().filter(include_categories=[kind]))))


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
