"""Retrieval tasks, which draft prompts and mark answers, and trials: prompts of a given length in tokens."""

from __future__ import annotations

import functools
import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any, ClassVar

from ...errors import DataError, Setting
from ...scaling.lengths import format_length
from ...tokenizer_tools.encode import prompt_ids as encode
from ...tokenizer_tools.encode import text_ids
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
        needle: the character of `prompt` at which the needle begins, or the first of the facts that
            one answer needs. None if several needles are asked for.
        choices: the texts of which `target` is one, if the answer is the likeliest of them. Empty:
            the answer is what the model writes.
    """

    prompt: str
    answers: tuple[str, ...]
    target: str
    needle: int | None = None
    choices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert self.prompt and not self.prompt[-1].isspace(), f"the prompt ends in a blank: {self.prompt[-40:]!r}"
        assert self.answers and not isinstance(self.answers, str), f"answers are several strings: {self.answers!r}"
        for text in (self.target, *self.choices):
            assert text.startswith(" "), f"the answer must follow after a blank: {text!r}"
        assert not self.choices or self.choices.count(self.target) == 1, f"{self.target!r} is not one of {self.choices}"


class Task(ABC):
    """A kind of prompt. Its size is counted in units: sentences, lines, pairs or words.

    Attributes:
        name: the name in rows and tables.
        new_tokens: tokens that the model may write.
        least: units of the smallest prompt.
        has_depth: True if the needle is put at a requested depth.
        chance: the score of a guess among the possible answers; 0 if they are too many to guess.
    """

    name: str
    new_tokens: ClassVar[int]
    least: ClassVar[int] = 1
    has_depth: ClassVar[bool] = False
    chance: ClassVar[float] = 0.0

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


@dataclass(frozen=True, kw_only=True)
class TrialOutput:
    """The probability of the right answer, and the answer that the model wrote.

    Args:
        logprobs: log-probability of each token of the right answer, nats, given the prompt and the
            answer's tokens before it. None if the server gives none.
        is_likeliest: True if every token of the right answer was the likeliest one. None if
            unknown.
        written: the model's answer under greedy decoding.
        choice_logprobs: log-probability of each of the trial's choices, nats.
    """

    logprobs: list[float] | None
    is_likeliest: bool | None
    written: str
    choice_logprobs: list[float] = field(default_factory=list)


Tokens = list[int]

_TAIL = 200  # characters of the prompt's end that are tokenised with the answer: no token looks back that far


@dataclass(frozen=True, kw_only=True)
class Trial:
    """The prompt and the right answer of one row.

    Attributes:
        prompt: the exact text.
        prompt_ids: its tokens, with a start token if the tokenizer adds one.
        answer_ids: tokens of the right answer after the prompt.
        answers: the strings that a right answer contains.
        target: the right answer as text. `answer_ids` include the blank before it.
        new_tokens: tokens that the model may write. Together with the prompt they stay within the
            requested length.
        needle: tokens of the prompt before the needle. None if several needles are asked for.
        choices: tokens of each text of which the right answer is one. Empty if there are none.
    """

    prompt: str
    prompt_ids: Tokens
    answer_ids: Tokens
    answers: tuple[str, ...]
    target: str
    new_tokens: int
    needle: int | None
    choices: tuple[Tokens, ...] = ()

    @property
    def depth(self) -> float | None:
        """The share of the prompt's tokens that come before the needle."""
        return None if self.needle is None else self.needle / len(self.prompt_ids)

    @property
    def sha256(self) -> str:
        """Hash of the prompt in UTF-8."""
        return hashlib.sha256(self.prompt.encode()).hexdigest()

    def choose(self, logprobs: Sequence[float]) -> tuple[float, float]:
        """How the choice of the likeliest of `choices` scores.

        Args:
            logprobs: log-probability of each of `choices`, nats.

        Returns:
            1 if the right one is the likeliest, 1/k if it is one of k that are, else 0, also where a
            number is NaN; and its log-probability less that of the likeliest other one.
        """
        right = logprobs[self.choices.index(self.answer_ids)]
        others = [nats for ids, nats in zip(self.choices, logprobs, strict=True) if ids != self.answer_ids]
        equal = sum(nats == right for nats in others)
        is_likeliest = all(nats <= right for nats in others)  # false beside NaN
        return 1 / (1 + equal) if is_likeliest else 0.0, right - max(others)


def assemble(task: Task, tokenizer: Any, place: Place, seed: int) -> Trial:
    """The longest prompt in whole units that fits into `place.context` together with its answer.

    The same task, place, seed and tokenizer give the same trial. Prompts of different lengths or
    depths are independent draws.

    Raises:
        DataError: the smallest prompt does not fit, or the task has too few units for the length.
    """

    @functools.cache
    def draft(units: int) -> Draft:
        return _draft(task, place, seed, units)

    units = most_within(place.context, lambda units: _needed(task, draft(units), tokenizer), task, place)
    filled = draft(units)
    prompt_ids = encode(filled.prompt, tokenizer)
    return Trial(
        prompt=filled.prompt,
        prompt_ids=prompt_ids,
        answer_ids=answer_ids(filled.prompt, filled.target, tokenizer),
        answers=filled.answers,
        target=filled.target.strip(),
        new_tokens=_most_written(task, filled, tokenizer),
        needle=None if filled.needle is None else len(encode(filled.prompt[: filled.needle].rstrip(), tokenizer)),
        choices=tuple(answer_ids(filled.prompt, choice, tokenizer) for choice in filled.choices),
    )


def check_smallest(places: Sequence[tuple[Task, Place]], context: int, tokenizer: Any, seeds: Sequence[int]) -> None:
    """Check that the smallest prompts of `context` tokens fit.

    Raises:
        DataError: one does not; names a length at which all do. Prompts of another length are other draws.
    """

    def longest(length: int) -> tuple[int, Task]:
        needed = (
            (_needed(task, _draft(task, replace(place, context=length), seed, task.least), tokenizer), task)
            for task, place in places
            for seed in seeds
        )
        return max(needed, key=lambda pair: pair[0])

    tokens, task = longest(context)
    if tokens > context:
        least = tokens
        while (more := longest(least)[0]) > least:
            least = more
        raise _does_not_fit(task, context, tokens, least)


def _draft(task: Task, place: Place, seed: int, units: int) -> Draft:
    source = f"{task.name} {task.settings} {place.context} {place.depth} {seed}"
    return task.draft(Random(source), units, place)


def _most_written(task: Task, draft: Draft, tokenizer: Any) -> int:
    """Tokens that may be written: those of the task, or of the longest answer if that is more."""
    texts = (draft.target, *draft.choices)
    return max(task.new_tokens, *(len(answer_ids(draft.prompt, text, tokenizer)) for text in texts))


def _needed(task: Task, draft: Draft, tokenizer: Any) -> int:
    """Tokens of the prompt and of what may be written."""
    return len(encode(draft.prompt, tokenizer)) + _most_written(task, draft, tokenizer)


def _does_not_fit(task: Task, budget: int, tokens: int, least: int) -> DataError:
    return DataError(
        f"{task.name} at {format_length(budget)}: the shortest prompt and its answer take {tokens} tokens with "
        f"this tokenizer; give a length of at least {least}"
    )


def most_within(budget: int, needed: Callable[[int], int], task: Task, place: Place) -> int:
    """The largest number of units for which `needed` is at most `budget`: by secant steps, then by
    bisection."""
    low, most = task.least, task.most(place)
    at_low = needed(low)
    if at_low > budget:
        raise _does_not_fit(task, budget, at_low, at_low)
    if most is not None and most <= low:
        raise DataError(
            f"{task.name}: the haystack has {most} sentences of {low + 1} needed; give a longer ",
            Setting("text", form="name"),
        )
    high, rate, steps = None, None, 0
    while high is None or high - low > 1:
        estimate = low + int((budget - at_low) / rate) if rate else low + 16
        guess = max(estimate, low + 1) if high is None else min(max(estimate, low + 1), high - 1)
        if steps > 8 and high is not None:
            guess = (low + high) // 2
        if most is not None and guess > most:
            guess = most
        tokens, steps = needed(guess), steps + 1
        rate = max((tokens - at_low) / (guess - low), 0.5)
        if tokens > budget:
            high = guess
        else:
            low, at_low = guess, tokens
            if guess == most:
                raise DataError(
                    f"{task.name} at {format_length(budget)}: the {most} sentences or words are only {tokens} "
                    "tokens; give a shorter length or a longer ",
                    Setting("text", form="name"),
                )
    return low


def answer_ids(prompt: str, answer: str, tokenizer: Any) -> Tokens:
    """Tokens of an answer after those of the prompt.

    If the tokenizer merges the end of the prompt with the answer, these are the tokens of the
    answer alone.
    """
    ids = functools.partial(text_ids, tokenizer=tokenizer)
    tail = prompt[-_TAIL:]
    before, both = ids(tail), ids(tail + answer)
    if both[: len(before)] == before:
        return both[len(before) :]
    alone = [ids(answer), ids(answer[1:])]  # SentencePiece adds a blank at the beginning
    end = tail[-20:] + answer
    return next((candidate for candidate in alone if tokenizer.decode(before + candidate).endswith(end)), alone[0])
