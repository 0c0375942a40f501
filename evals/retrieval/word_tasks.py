"""Retrieval tasks that count words: which words of a text are common or frequent."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from typing import Any, ClassVar

from .haystack import WORDS_VERSION, all_words
from .task import Draft, Place, Task, enumerated, match_all

_TOP = 10  # common words that the question asks for
_FREQUENT = 3  # frequent words that the question asks for
_SHORT = 4096  # below this many tokens RULER repeats words less often
_ALPHA = 2.0  # exponent of the zeta distribution of coded words


@dataclass(frozen=True)
class CommonWords(Task):
    """RULER's common words extraction (arXiv 2404.06654): the ten most common words of a numbered
    list.

    These ten words occur 30 times each and all others 3 times. Before the list comes an example
    with 10 and 3 occurrences. Below 4k tokens of context it is 6 and 1 occurrences, and 3 and 1 in
    the example. A unit is a distinct word of the list.
    """

    name: str = "cwe"
    new_tokens: ClassVar[int] = 120
    least: ClassVar[int] = 2 * _TOP

    @property
    def settings(self) -> dict[str, Any]:
        return super().settings | {"words": WORDS_VERSION}

    def most(self, place: Place) -> int | None:
        return len(all_words())

    def draft(self, random: Random, units: int, place: Place) -> Draft:
        if place.context < _SHORT:
            example, real = (20, 3, 1), (units, 6, 1)
        else:
            example, real = (40, 10, 3), (units, 30, 3)
        example_text, shown_words = self._question(random, *example)
        question, words = self._question(random, *real)
        return Draft(
            prompt=f"{example_text} {_numbered(shown_words)}\n{question}",
            answers=tuple(words),
            target=f" {_numbered(words)}",
        )

    def _question(self, random: Random, count: int, often: int, seldom: int) -> tuple[str, list[str]]:
        words = random.sample(all_words(), count)
        listed = words[:_TOP] * often + words[_TOP:] * seldom
        random.shuffle(listed)
        return (
            "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones "
            f"that appear most often.\n{_numbered(listed)}\nQuestion: What are the {_TOP} most common words in the "
            f"above list? Answer: The top {_TOP} words that appear most often in the list are:"
        ), words[:_TOP]

    def mark(self, written: str, answers: Sequence[str]) -> float:
        return match_all(written, answers)


@dataclass(frozen=True)
class FrequentWords(Task):
    """RULER's frequent words extraction (arXiv 2404.06654): the three most frequent of made-up
    words.

    The words have six letters, and there is one for every 50 tokens of the context. The share of
    the word of rank k is k^-2 / zeta(2). The first rank consists of dots, which do not count. A
    unit is a word of the text.
    """

    name: str = "fwe"
    new_tokens: ClassVar[int] = 50
    least: ClassVar[int] = 60  # with fewer words, ranks 4 and 5 occur equally often

    def draft(self, random: Random, units: int, place: Place) -> Draft:
        from scipy.special import zeta

        words: dict[str, None] = {"...": None}
        while len(words) < max((place.context - self.new_tokens) // 50, _FREQUENT + 2):
            words["".join(random.choices(string.ascii_lowercase, k=6))] = None
        counts = [int(units * rank**-_ALPHA / float(zeta(_ALPHA))) for rank in range(1, len(words) + 1)]
        assert all(more > fewer for more, fewer in pairwise(counts[: _FREQUENT + 2])), counts
        text = [word for word, count in zip(words, counts, strict=True) for _ in range(count)]
        random.shuffle(text)
        answers = list(words)[1 : _FREQUENT + 1]
        prompt = (
            "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
            f"appeared coded words. {' '.join(text)}\nQuestion: Do not provide any explanation. Please ignore the dots "
            "'....'. What are the three most frequently appeared words in the above coded text? Answer: According to "
            "the coded text above, the three most frequently appeared words are:"
        )
        return Draft(prompt=prompt, answers=tuple(answers), target=f" {enumerated(answers)}")

    def mark(self, written: str, answers: Sequence[str]) -> float:
        return match_all(written, answers)


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, start=1))
