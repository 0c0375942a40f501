"""Trials: a prompt of a task with a given length in tokens, and the model's answer to it."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from ...errors import DataError
from ...scaling.lengths import format_length
from ...tokenizer_tools.encode import prompt_ids as encode
from ...tokenizer_tools.encode import text_ids
from .task import Draft, Place, Task


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
            f"this tokenizer; ask for a length of at least {at_low}"
        )
    if most is not None and most <= low:
        raise DataError(f"{task.name}: the haystack has {most} sentences of {low + 1} needed; give a longer --text")
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
                    "tokens; ask for a shorter length or give a longer --text"
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
