"""Retrieval tasks that look up a value: passkey, key-value pairs, variable tracking, and needles in a haystack."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any, ClassVar, Literal

from ..data import Text
from .haystack import (
    NOISE_LINE,
    WORDS_VERSION,
    boundary,
    drawn_anew,
    noise,
    random_key,
    random_uuid,
    sentences,
    stretch,
    with_needles,
)
from .task import Draft, Place, Task, enumerated, match_all, match_first


@dataclass(frozen=True)
class Passkey(Task):
    """Find a number of five digits in repeated sentences (Mohtashami and Jaggi, arXiv 2305.16300).

    An answer is right if the first number that the model writes is the passkey.
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

    A unit is a pair. An answer is right if the first word with a digit is the value.
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


_HOPS = 4
_EXAMPLE_LINES = 15  # about 500 tokens, as RULER's example has


@dataclass(frozen=True)
class VariableTracking(Task):
    """Name the five variables that have one value (RULER, arXiv 2404.06654).

    The value is assigned to the first variable, and each other variable is assigned the one before
    it. A solved example comes first. A unit is a line of noise.
    """

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


_DEPTHS = 40  # RULER draws the depths of needles from this many evenly spaced depths, without replacement


@dataclass(frozen=True, kw_only=True)
class Needles(Task):
    """Find the magic numbers (or UUIDs) of keys (RULER, arXiv 2404.06654, section 3).

    The score of an answer is `match_all`. If a depth is requested, the needle of the requested key
    lies there.

    Args:
        hay: sentences of a text, lines of noise, or lines with the form of a needle.
        key: an adjective and a noun, or a UUID.
        value: seven digits, or a UUID.
        keys: keys that have a needle.
        values: needles per key.
        queries: keys that the question asks for.
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
        assert not any(key in unit for key in taken for unit in hay), f"the haystack contains a key or value: {taken}"
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
        """RULER's template for the beginning and the question. It has a singular form for one
        value."""
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
    """The needle of `niah_single_2` at a requested depth."""

    name: str = "niah"
    new_tokens: ClassVar[int] = 32
    has_depth: ClassVar[bool] = True


def _number(random: Random) -> str:
    return str(random.randint(1_000_000, 9_999_999))


_KINDS: dict[str, Callable[[Random], str]] = {"words": random_key, "numbers": _number, "uuids": random_uuid}
