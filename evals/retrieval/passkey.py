"""The passkey: five digits said once in a long text of nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import ClassVar

from .haystack import boundary, noise, with_needles
from .task import Draft, Place, Task, match_first


@dataclass(frozen=True)
class Passkey(Task):
    """Find a number of five digits in repeated sentences (Mohtashami and Jaggi, arXiv 2305.16300).

    The answer must be the first number that the model writes.
    """

    name: str = "passkey"
    new_tokens: ClassVar[int] = 16
    has_depth: ClassVar[bool] = True

    def draft(self, random: Random, units: int, place: Place) -> Draft:
        assert place.depth is not None
        key = str(random.randint(10_000, 99_999))
        hay = noise(units)
        needle = f"The pass key is {key}. Remember it. {key} is the pass key. "
        body, (start,) = with_needles(hay, [(boundary(hay, place.depth), needle)])
        opening = (
            "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz "
            "you about the important information there.\n"
        )
        question = "\nWhat is the pass key? The pass key is"
        return Draft(prompt=opening + body + question, answers=(key,), target=f" {key}", needle=len(opening) + start)

    def mark(self, written: str, answers: Sequence[str]) -> float:
        return match_first(written, answers)
