"""Tasks that look a value up: passkey, key-value and variable tracking."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import ClassVar
from uuid import UUID

from .haystack import NOISE_LINE, boundary, noise, with_needles
from .task import Draft, Place, Task, match_all, match_first


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


@dataclass(frozen=True)
class KeyValue(Task):
    """The value of one key in a JSON object of random UUIDs (Liu et al., "Lost in the Middle",
    arXiv 2307.03172).

    A unit is a pair. The value must be the first word with a digit that the model writes.
    """

    name: str = "kv"
    new_tokens: ClassVar[int] = 48
    has_depth: ClassVar[bool] = True

    def draft(self, random: Random, units: int, place: Place) -> Draft:
        assert place.depth is not None
        pairs = [(random_uuid(random), random_uuid(random)) for _ in range(units)]
        key, value = pairs[0]
        assert sum(key in pair for pair in pairs) == 1, f"the key {key} occurs twice"
        index = round(place.depth * (units - 1))
        pairs[0], pairs[index] = pairs[index], pairs[0]
        lines = [f'"{name}": "{content}"' for name, content in pairs]
        opening = "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n{"
        body = ",\n ".join(lines)
        return Draft(
            prompt=f'{opening}{body}}}\n\nKey: "{key}"\nCorresponding value:',
            answers=(value,),
            target=f' "{value}"',
            needle=len(opening) + sum(len(line) + 3 for line in lines[:index]),
        )

    def mark(self, written: str, answers: Sequence[str]) -> float:
        return match_first(written, answers)


def random_uuid(random: Random) -> str:
    """A version 4 UUID."""
    return str(UUID(int=random.getrandbits(128), version=4))


_HOPS = 4
_EXAMPLE_LINES = 15  # about the 500 tokens that RULER gives its example


@dataclass(frozen=True)
class VariableTracking(Task):
    """Name the five variables that have one value (arXiv 2404.06654): the first is given it, each
    other one the variable before it. Asked after a solved example. A unit is a line of noise."""

    name: str = "vt"
    new_tokens: ClassVar[int] = 30
    least: ClassVar[int] = _HOPS + 1

    def draft(self, random: Random, units: int, place: Place) -> Draft:
        example, example_words = self._question(random, _EXAMPLE_LINES, letters=3)
        question, question_words = self._question(random, units, letters=5)
        return Draft(
            prompt=f"{example} {' '.join(example_words)}\n\n{question}",
            answers=tuple(question_words),
            target=f" {' '.join(question_words)}",
        )

    def _question(self, random: Random, lines: int, letters: int) -> tuple[str, list[str]]:
        names: dict[str, None] = {}
        while len(names) <= _HOPS:
            names["".join(random.choices(string.ascii_uppercase, k=letters))] = None
        value = random.randint(10_000, 99_999)
        first, *others = names
        chain = [f"VAR {first} = {value}\n"]
        chain += [f"VAR {name} = VAR {before}\n" for before, name in zip(names, others, strict=False)]
        places = sorted(random.sample(range(lines), len(chain)))
        body, _ = with_needles([NOISE_LINE] * lines, list(zip(places, chain, strict=True)))
        return (
            "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
            f"{body}\nQuestion: Find all variables that are assigned the value {value} in the text above. Answer: "
            f"According to the chain(s) of variable assignment in the text above, {len(names)} variables are assigned "
            f"the value {value}, they are:"
        ), list(names)

    def mark(self, written: str, answers: Sequence[str]) -> float:
        return match_all(written, answers)
