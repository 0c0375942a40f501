"""Retrieval tasks, which draft prompts and mark answers, and trials: prompts of a given length in tokens."""

from __future__ import annotations

import functools
import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True, kw_only=True)
class TrialOutput:
    """The probability of the right answer, and the answer that the model wrote.

    Args:
        logprobs: log-probability of each token of the right answer, nats, given the prompt and the
            answer's tokens before it. None if the server gives none.
        is_likeliest: True if every token of the right answer was the likeliest one. None if
            unknown.
        written: the model's answer under greedy decoding.
    """

    logprobs: list[float] | None
    is_likeliest: bool | None
    written: str


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
    """

    prompt: str
    prompt_ids: Tokens
    answer_ids: Tokens
    answers: tuple[str, ...]
    target: str
    new_tokens: int
    needle: int | None

    @property
    def depth(self) -> float | None:
        """The share of the prompt's tokens that come before the needle."""
        return None if self.needle is None else self.needle / len(self.prompt_ids)

    @property
    def sha256(self) -> str:
        """Hash of the prompt in UTF-8."""
        return hashlib.sha256(self.prompt.encode()).hexdigest()


def assemble(task: Task, tokenizer: Any, place: Place, seed: int) -> Trial:
    """The longest prompt in whole units that fits into `place.context` together with its answer.

    The same task, place, seed and tokenizer give the same trial. Prompts of different lengths or
    depths are independent draws.

    Raises:
        DataError: the smallest prompt does not fit, or the task has too few units for the length.
    """
    source = f"{task.name} {task.settings} {place.context} {place.depth} {seed}"

    @functools.cache
    def draft(units: int) -> Draft:
        return task.draft(Random(source), units, place)

    def needed(units: int) -> int:
        drafted = draft(units)
        answer = answer_ids(drafted, tokenizer)
        return len(encode(drafted.prompt, tokenizer)) + max(task.new_tokens, len(answer))

    units = most_within(place.context, needed, task, place)
    filled = draft(units)
    prompt_ids, answer = encode(filled.prompt, tokenizer), answer_ids(filled, tokenizer)
    return Trial(
        prompt=filled.prompt,
        prompt_ids=prompt_ids,
        answer_ids=answer,
        answers=filled.answers,
        target=filled.target.strip(),
        new_tokens=max(task.new_tokens, len(answer)),
        needle=None if filled.needle is None else len(encode(filled.prompt[: filled.needle].rstrip(), tokenizer)),
    )


def most_within(budget: int, needed: Callable[[int], int], task: Task, place: Place) -> int:
    """The largest number of units for which `needed` is at most `budget`: by secant steps, then by
    bisection."""
    low, most = task.least, task.most(place)
    at_low = needed(low)
    if at_low > budget:
        raise DataError(
            f"{task.name} at {format_length(budget)}: the shortest prompt and its answer take {at_low} tokens with "
            f"this tokenizer; give a length of at least {at_low}"
        )
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


def answer_ids(draft: Draft, tokenizer: Any) -> Tokens:
    """Tokens of the answer after those of the prompt.

    If the tokenizer merges the end of the prompt with the answer, these are the tokens of the
    answer alone.
    """
    ids = functools.partial(text_ids, tokenizer=tokenizer)
    tail = draft.prompt[-_TAIL:]
    before, both = ids(tail), ids(tail + draft.target)
    if both[: len(before)] == before:
        return both[len(before) :]
    alone = [ids(draft.target), ids(draft.target[1:])]  # SentencePiece adds a blank at the beginning
    end = tail[-20:] + draft.target
    return next((candidate for candidate in alone if tokenizer.decode(before + candidate).endswith(end)), alone[0])
