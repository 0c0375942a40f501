"""RULER's variable tracking: a chain of assignments, scattered over lines of noise."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import ClassVar

from .haystack import NOISE_LINE, with_needles
from .task import Draft, Place, Task, match_all

_HOPS = 4
_EXAMPLE_LINES = 15  # about the 500 tokens that RULER gives its example


@dataclass(frozen=True)
class VariableTracking(Task):
    """Name the five variables that have one value (arXiv 2404.06654): the first is given it, each other one the
    variable before it. Asked after a solved example. A unit is a line of noise."""

    name: str = "vt"
    new_tokens: ClassVar[int] = 30
    least: ClassVar[int] = _HOPS + 1

    def draft(self, random: Random, units: int, place: Place) -> Draft:
        example, shown = self._question(random, _EXAMPLE_LINES, letters=3)
        question, asked = self._question(random, units, letters=5)
        return Draft(
            prompt=f"{example} {' '.join(shown)}\n\n{question}", answers=tuple(asked), target=f" {' '.join(asked)}"
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
