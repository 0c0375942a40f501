"""What a retrieval task is: it drafts prompts of any size, and marks what a model wrote."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar

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
