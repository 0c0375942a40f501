"""Rows of trials put together: groups of comparable rows, and their scores with intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean

import numpy as np

from ..runs.compare import METHOD, group_key, methods, short
from ..runs.result import Row
from ..statistics import block_interval, mean_interval
from .tasks import SUITES, TASKS

ENOUGH = 20
"""Trials below which an interval is too wide to tell much."""

MEASURED = frozenset(
    (
        *("key", "correct", "answer", "generated", "answer_tokens", "prompt_tokens", "actual_depth", "prompt_sha256"),
        *("answer_logprob", "answer_logprob_per_token", "answer_is_likeliest", "seconds", "peak_memory_mb"),
    )
)
"""Fields of a trial's row that are not of its recipe."""

_COLUMN = METHOD | {"context", "depth", "seed", "task"}


@dataclass(frozen=True, kw_only=True)
class TrialScore:
    """How right some trials were, 0 to 1, with 95% intervals (NaN where there are too few trials
    for one).

    Args:
        right: of each trial, task by task.
        logprobs: of the right answer of each trial, nats a token; none of those whose server did
            not tell.
    """

    right: tuple[tuple[float, ...], ...]
    logprobs: tuple[float, ...]

    @property
    def trials(self) -> int:
        """Of all tasks together."""
        return sum(map(len, self.right))

    @property
    def mean(self) -> float:
        """Over tasks, of the mean of each: every task counts alike."""
        return fmean(map(fmean, self.right))

    @cached_property
    def interval(self) -> tuple[float, float]:
        """Of `mean`."""
        return mean_interval(self.right)

    @property
    def low(self) -> float:
        """Lower bound of `mean`."""
        return self.interval[0]

    @property
    def high(self) -> float:
        """Upper bound of `mean`."""
        return self.interval[1]

    @property
    def nats(self) -> float:
        """Mean log-probability of the right answer, nats a token; NaN if no server gives it."""
        return fmean(self.logprobs) if self.logprobs else math.nan

    @cached_property
    def nats_interval(self) -> tuple[float, float]:
        """Of `nats`."""
        return block_interval(np.array(self.logprobs), block=1)


def score(rows: Sequence[Row]) -> TrialScore:
    """The score of rows of one or more tasks."""
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
        rows: at least one.
    """

    rows: tuple[Row, ...]

    @property
    def suite(self) -> str:
        """`passkey`, `niah`, `kv` or `ruler-11-offline`."""
        return str(self.rows[0]["suite"])

    @property
    def trained_length(self) -> int:
        """Of the model, tokens."""
        return int(self.rows[0]["trained_length"])

    @property
    def methods(self) -> list[str]:
        """Rope specs, the untouched model first."""
        return methods(self.rows)

    @property
    def lengths(self) -> list[int]:
        """In tokens, ascending."""
        return sorted({row["context"] for row in self.rows})

    @property
    def depths(self) -> list[float]:
        """The requested depths, ascending; empty where the seed chose them."""
        return sorted({row["depth"] for row in self.rows if row["depth"] is not None})

    @property
    def tasks(self) -> list[str]:
        """In the suite's order."""
        names = {row["task"] for row in self.rows}
        return [task for task in SUITES[self.suite] if task in names]

    @property
    def name(self) -> str:
        """The name of the suite, for people."""
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
        """The suite, the model and the text, in one line."""
        return f"{self.name}: {self.measured_on}."

    def score(
        self, rope: str, length: int, *, task: str | None = None, depth: float | None = None
    ) -> TrialScore | None:
        """Of these trials; None if there are none. Over several tasks, None too while one of them
        is missing."""
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
        """Of a method, by length."""
        scores = {length: self.score(rope, length) for length in self.lengths}
        return {length: score for length, score in scores.items() if score is not None}


def score_groups(rows: Iterable[Row]) -> list[ScoreGroup]:
    """Retrieval rows in settings, in order of appearance; rows of other kinds are left out.

    Tasks of one suite may have settings of their own (RULER's with drawn words have the list's
    version): a row goes with every group of other tasks that holds all of its own.
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
