"""Scores of retrieval trials, such as the share of passkeys that were found, with confidence
intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean

import numpy as np

from ..runs.compare import METHOD, group_key, methods, short
from ..runs.result import Row
from ..statistics import block_interval, mean_score_interval
from .tasks import SUITES, TASKS

ENOUGH = 20
"""With fewer trials an interval is too wide to be useful."""

MEASURED = frozenset(
    (
        *("key", "correct", "answer", "generated", "answer_tokens", "prompt_tokens", "actual_depth", "prompt_sha256"),
        *("answer_logprob", "answer_logprob_per_token", "answer_is_likeliest", "seconds", "peak_memory_mb"),
        *("choice_margin", "correct_written"),
    )
)
"""Fields of a trial's row that are not part of its recipe."""

_COLUMN = METHOD | {"context", "depth", "seed", "task"}


@dataclass(frozen=True, kw_only=True)
class TrialScore:
    """The mean score of some trials, 0 to 1, with its 95% interval.

    The bounds are NaN if there are too few trials for an interval.

    Args:
        right: the score of each trial, grouped by task.
        logprobs: log-probability of the right answer of each trial, nats per token. Trials of
            servers that give none are missing.
    """

    right: tuple[tuple[float, ...], ...]
    logprobs: tuple[float, ...]

    @property
    def trials(self) -> int:
        """The number of trials of all tasks."""
        return sum(map(len, self.right))

    @property
    def mean(self) -> float:
        """The mean over tasks of the mean of each task: every task has the same weight."""
        return fmean(map(fmean, self.right))

    @cached_property
    def interval(self) -> tuple[float, float]:
        """95% interval of `mean`; for one task with scores 0 or 1 it is Wilson's."""
        return mean_score_interval(self.right)

    @property
    def low(self) -> float:
        """Lower bound of the interval of `mean`."""
        return self.interval[0]

    @property
    def high(self) -> float:
        """Upper bound of the interval of `mean`."""
        return self.interval[1]

    @property
    def nats(self) -> float:
        """Mean log-probability of the right answer, nats per token; NaN if no server gives it."""
        return fmean(self.logprobs) if self.logprobs else math.nan

    @cached_property
    def nats_interval(self) -> tuple[float, float]:
        """95% interval of `nats`."""
        return block_interval(np.array(self.logprobs), block=1)


def score(rows: Sequence[Row]) -> TrialScore:
    """The score of the rows of one or more tasks."""
    by_task: dict[str, list[float]] = {}
    for row in rows:
        by_task.setdefault(row["task"], []).append(float(row["correct"]))
    logprobs = (row["answer_logprob_per_token"] for row in rows)
    return TrialScore(
        right=tuple(map(tuple, by_task.values())), logprobs=tuple(nats for nats in logprobs if nats is not None)
    )


@dataclass(frozen=True, kw_only=True)
class ScoreGroup:
    """Rows that differ only in method, length, task, depth and seed.

    Args:
        rows: at least one row.
    """

    rows: tuple[Row, ...]

    @property
    def suite(self) -> str:
        """`passkey`, `niah`, `kv` or `ruler-11-offline`."""
        return str(self.rows[0]["suite"])

    @property
    def trained_length(self) -> int:
        """The trained length of the model in tokens."""
        return int(self.rows[0]["trained_length"])

    @property
    def methods(self) -> list[str]:
        """Rope specs, the untouched model first."""
        return methods(self.rows)

    @property
    def lengths(self) -> list[int]:
        """Lengths in tokens, ascending."""
        return sorted({row["context"] for row in self.rows})

    @property
    def depths(self) -> list[float]:
        """The requested depths, ascending; empty if the seed chose them."""
        return sorted({row["depth"] for row in self.rows if row["depth"] is not None})

    @property
    def tasks(self) -> list[str]:
        """The names of the tasks, in the order of the suite."""
        names = {row["task"] for row in self.rows}
        return [task for task in SUITES[self.suite] if task in names]

    @property
    def name(self) -> str:
        """The name of the suite for display."""
        if self.suite in SUITES[self.suite]:
            return self.suite
        tasks = self.tasks
        return "RULER-11, offline" if len(tasks) == len(SUITES[self.suite]) else f"{len(tasks)} of RULER's tasks"

    @property
    def measured_on(self) -> str:
        """`smollm2-135m (bfloat16) on kjv`."""
        row = self.rows[0]
        return f"{short(row['model'])} ({row['dtype']})" + (f" on {short(row['text'])}" if row["text"] else "")

    @property
    def caption(self) -> str:
        """The suite, the model and the text in one line."""
        return f"{self.name}: {self.measured_on}."

    @property
    def chance(self) -> float:
        """The score of a guess, as a mean over tasks; 0 where there are too many answers to guess."""
        tasks = [TASKS.get(name) for name in self.tasks]
        return fmean(0.0 if task is None else task.chance for task in tasks) if tasks else 0.0

    @property
    def chance_note(self) -> str:
        """A blank and `A guess scores 25%.`, or nothing where a guess scores 0."""
        return f" A guess scores {self.chance:.0%}." if self.chance else ""

    def score(
        self, rope: str, length: int, *, task: str | None = None, depth: float | None = None
    ) -> TrialScore | None:
        """The score of the trials of one method and length, optionally of one task or depth.

        None if there are no such trials, or if a task of several is missing.
        """
        rows = [
            row
            for row in self.rows
            if (row["rope"], row["context"]) == (rope, length)
            and task in (None, row["task"])
            and depth in (None, row["depth"])
        ]
        required = {task} if task else {*self.tasks}
        return score(rows) if {row["task"] for row in rows} == required else None

    def scores(self, rope: str) -> dict[int, TrialScore]:
        """The scores of a method by length."""
        scores = {length: self.score(rope, length) for length in self.lengths}
        return {length: score for length, score in scores.items() if score is not None}


def score_groups(rows: Iterable[Row]) -> list[ScoreGroup]:
    """Retrieval rows in groups of comparable rows, in order of appearance. Rows of other kinds are
    left out.

    Some tasks of a suite have settings that others lack: RULER's tasks with drawn words have the
    version of the word list. A row belongs to every group whose settings include the row's own.
    """
    groups: dict[str, dict[frozenset[tuple[str, object]], list[Row]]] = {}
    for row in rows:
        if "suite" in row:
            task = TASKS.get(row["task"])
            names = () if task is None else task.settings
            settings = frozenset((name, row.get(name)) for name in names)
            shared = group_key(row, MEASURED | _COLUMN | {*names})
            groups.setdefault(shared, {}).setdefault(settings, []).append(row)
    return [
        ScoreGroup(rows=tuple(row for other, part in group.items() if other <= settings for row in part))
        for group in groups.values()
        for settings in group
        if not any(settings < other for other in group)
    ]
