"""Needles in a haystack: RULER's eight tasks of this kind, and the one whose depth is chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any, ClassVar, Literal

from ..data import Text
from .haystack import NOISE_LINE, boundary, drawn_anew, sentences, stretch, with_needles
from .lookups import random_uuid
from .task import Draft, Place, Task, enumerated, match_all
from .words import WORDS_VERSION, random_key

_DEPTHS = 40  # RULER draws the depths of needles in a text from so many, evenly spaced, none twice


@dataclass(frozen=True, kw_only=True)
class Needles(Task):
    """Say what the magic number (or UUID) of a key is (RULER, arXiv 2404.06654, section 3).

    The score is `match_all` of what the model writes. With a depth, the needle that is asked for
    stands there.

    Args:
        hay: sentences of a text, lines of noise, or lines that look like the needle.
        key: an adjective and a noun, or a UUID.
        value: seven digits, or a UUID.
        keys: keys that have a needle.
        values: needles of each key.
        queries: keys asked for.
    """

    name: str
    hay: Literal["text", "noise", "needles"] = "text"
    key: Literal["words", "uuids"] = "words"
    value: Literal["numbers", "uuids"] = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1
    new_tokens: ClassVar[int] = 128
    least: ClassVar[int] = 8

    @property
    def needs_text(self) -> bool:
        return self.hay == "text"

    @property
    def settings(self) -> dict[str, Any]:
        return super().settings | {"words": WORDS_VERSION}

    def most(self, place: Place) -> int | None:
        return len(sentences(place.text)) if self.hay == "text" and place.text else None

    def draft(self, random: Random, units: int, place: Place) -> Draft:
        text = place.text if self.hay == "text" else None
        taken: list[str] = []

        def fresh(draw: Callable[[Random], str]) -> str:
            taken.append(drawn_anew(partial(draw, random), taken, text))
            return taken[-1]

        new_key, new_value = _KINDS[self.key], _KINDS[self.value]
        pairs = [
            (key, fresh(new_value)) for key in [fresh(new_key) for _ in range(self.keys)] for _ in range(self.values)
        ]
        keys = random.sample(list(dict.fromkeys(key for key, _ in pairs)), self.queries)
        hay = self._hay(random, units, text, taken)
        assert not any(key in unit for key in taken for unit in hay), f"a needle's key or value is in the hay: {taken}"
        random.shuffle(pairs)
        needles = list(zip(self._places(random, hay, place.depth), pairs, strict=True))
        end = " " if self.hay == "text" else "\n"
        body, starts = with_needles(hay, [(index, self._needle(*pair) + end) for index, pair in needles])
        chosen = [(key, value, start) for (_, (key, value)), start in zip(needles, starts, strict=True) if key in keys]
        answers = [value for key in keys for name, value, _ in chosen if name == key]
        opening, question = self._frame(enumerated(keys), single=len(answers) == 1)
        return Draft(
            prompt=f"{opening}\n{body}\n{question}",
            answers=tuple(answers),
            target=f" {enumerated(answers)}",
            needle=len(opening) + 1 + chosen[0][2] if len(chosen) == 1 else None,
        )

    def mark(self, written: str, answers: Sequence[str]) -> float:
        return match_all(written, answers)

    def _hay(self, random: Random, units: int, text: Text | None, taken: Sequence[str]) -> list[str]:
        if text is not None:
            return stretch(text, random.randrange(len(sentences(text))), units)
        if self.hay == "noise":
            return [NOISE_LINE] * units
        draws = [_KINDS[kind] for kind in (self.key, self.value)]

        def line() -> str:
            key, value = (drawn_anew(partial(draw, random), taken) for draw in draws)
            return self._needle(key, value) + "\n"

        return [line() for _ in range(units)]

    def _places(self, random: Random, hay: Sequence[str], depth: float | None) -> list[int]:
        count = self.keys * self.values
        if depth is not None:
            return [boundary(hay, depth)]
        if self.hay == "text":
            depths = random.sample(range(_DEPTHS), count)
            return sorted(boundary(hay, number / (_DEPTHS - 1)) for number in depths)
        return sorted(random.sample(range(len(hay)), count))

    def _needle(self, key: str, value: str) -> str:
        return f"One of the special magic {self.value} for {key} is: {value}."

    def _frame(self, keys: str, *, single: bool) -> tuple[str, str]:
        """RULER's template; it has a singular where one value is asked for."""
        what = self.value[:-1] if single else self.value
        a, are, are_all = ("A", "is", "is") if single else ("Some", "are", "are all")
        opening = (
            f"{a} special magic {what} {are} hidden within the following text. Make sure to memorize it. "
            f"I will quiz you about the {what} afterwards."
        )
        ending = f"the special magic {what} for {keys} mentioned in the provided text"
        return opening, f"What {are_all} {ending}? The{ending[3:]} {are}"


@dataclass(frozen=True, kw_only=True)
class Niah(Needles):
    """The needle of `niah_single_2`, at a depth that is chosen."""

    name: str = "niah"
    new_tokens: ClassVar[int] = 32
    has_depth: ClassVar[bool] = True


def _number(random: Random) -> str:
    return str(random.randint(1_000_000, 9_999_999))


_KINDS: dict[str, Callable[[Random], str]] = {"words": random_key, "numbers": _number, "uuids": random_uuid}
