"""Retrieval tasks that follow a list through a program."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar

from .haystack import WORDS_VERSION, boundary, plain_words, with_needles
from .task import Draft, Place, Task

_OPERATIONS = 6  # that the answer depends on
_NUMBERS = range(10, 100)

Numbers = list[int]


@dataclass(frozen=True)
class _Operation:
    """A call of a method of the list."""

    method: str
    arguments: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"items.{self.method}({', '.join(map(str, self.arguments))})\n"

    def run(self, items: Numbers) -> None:
        getattr(items, self.method)(*self.arguments)


def _after(items: Numbers, calls: Sequence[_Operation]) -> Numbers:
    items = [*items]
    for call in calls:
        call.run(items)
    return items


@dataclass(frozen=True)
class LatentList(Task):
    """What a Python list is after the operations of a long program: the idea of Latent List
    (Michelangelo, arXiv 2409.12640).

    Six operations change the list, at random places of the program. The answer differs from that of
    the first list, and from that without the last operation. A unit is a filler: a comment, a line
    that prints or assigns something else, or two operations that cancel each other. The question
    asks for a slice, or for len, sum, min or max.
    """

    name: str = "latent-list"
    new_tokens: ClassVar[int] = 16

    @property
    def settings(self) -> dict[str, Any]:
        return super().settings | {"words": WORDS_VERSION}

    def draft(self, random: Random, units: int, place: Place) -> Draft:
        first, calls, question, answer = _program(random)
        places = sorted(random.random() for _ in calls)
        fillers = [_filler(random) for _ in range(units)]
        hay = [text for text, _ in fillers]
        indices = [boundary(hay, share) for share in places]
        whole: list[_Operation] = []
        for number, (_, own) in enumerate([*fillers, ("", [])]):
            whole += [call for call, index in zip(calls, indices, strict=True) if index == number]
            whole += own
        assert str(question.value(_after(first, whole))) == answer, f"a filler changes the answer {answer}"
        body, _ = with_needles(hay, list(zip(indices, map(str, calls), strict=True)))
        return Draft(
            prompt=f"This is a Python program.\n\nitems = {first}\n{body}\n\n"
            f"At the end of the program, {question.source} ==",
            answers=(answer,),
            target=f" {answer}",
        )

    def mark(self, written: str, answers: Sequence[str]) -> float:
        value = re.search(r"\[[^\]]*\]|\d+", written)
        return float(value is not None and re.sub(r"\s", "", value[0]) == re.sub(r"\s", "", answers[0]))


@dataclass(frozen=True)
class _Question:
    """An expression of the list."""

    source: str
    value: Callable[[Numbers], object]


def _question(random: Random) -> _Question:
    start = random.randrange(2)
    part = slice(start, start + random.randint(2, 3))
    return random.choice(
        [
            _Question(f"items[{part.start}:{part.stop}]", lambda items: items[part]),
            _Question("len(items)", len),
            _Question("sum(items)", sum),
            _Question("min(items)", min),
            _Question("max(items)", max),
        ]
    )


def _program(random: Random) -> tuple[Numbers, list[_Operation], _Question, str]:
    """The first list, the operations, the question and its answer."""
    question = _question(random)
    while True:
        fresh = iter(random.sample(_NUMBERS, 20))  # no number comes twice
        first = [next(fresh) for _ in range(random.randint(4, 6))]
        items = [*first]
        calls: list[_Operation] = []
        while len(calls) < _OPERATIONS:
            calls.append(_drawn_operation(random, items, fresh))
            calls[-1].run(items)
        answer = question.value(items)
        if answer not in (question.value(first), question.value(_after(first, calls[:-1]))):
            return first, calls, question, str(answer)


def _drawn_operation(random: Random, items: Numbers, fresh: Iterator[int]) -> _Operation:
    """An operation on the list as it is; it keeps at least three numbers."""
    grows = [_Operation("append", (next(fresh),)), _Operation("insert", (random.randrange(len(items)), next(fresh)))]
    shrinks = [
        _Operation("pop"),
        _Operation("pop", (random.randrange(len(items)),)),
        _Operation("remove", (random.choice(items),)),
    ]
    calls: list[_Operation] = [*grows, *(shrinks if len(items) > 3 else ()), _Operation("sort"), _Operation("reverse")]
    return random.choice(calls)


def _filler(random: Random) -> tuple[str, list[_Operation]]:
    """Lines that leave the list as it is, and their operations on it."""
    phrase = f"{random.choice(plain_words('adjective'))} {random.choice(plain_words('noun'))}"
    number = random.choice(_NUMBERS)
    texts = [f'print("{phrase}")\n', f"# {phrase}\n", f"other = {random.sample(_NUMBERS, 3)}\n", "size = len(items)\n"]
    calls = random.choice(
        [[_Operation("append", (number,)), _Operation("pop")], [_Operation("reverse"), _Operation("reverse")]]
    )
    return random.choice([*((text, []) for text in texts), ("".join(map(str, calls)), calls)])
