"""Cells of retrieval trials. Each trial reads its prompt once, scores the right answer and writes
its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from ...errors import ConfigError, DataError
from ...scaling.rope import Scaler
from ..data import Text, load_text
from ..models.measured import Advance, MeasuredModel
from ..runs.cell import Cell, rope_recipe, shared_recipe
from ..runs.result import Row, Run
from .task import Place, Task, Trial, assemble, check_smallest
from .tasks import SUITE_OF, TASKS


@dataclass(frozen=True, kw_only=True)
class RetrievalCell(Cell):
    """The trials of one task under one scaler, at one length and depth. Each trial gives a row as
    soon as it is done.

    Args:
        recipe: the recipe of its rows without the seed.
        seeds: one seed per trial.
        before: called with each trial before the model reads it.
    """

    scaler: Scaler
    context: int
    task: Task
    place: Place
    recipe: dict[str, Any]
    seeds: tuple[int, ...]
    before: Callable[[Trial], None] = field(default=lambda _: None, compare=False)

    @property
    def label(self) -> str:
        depth = "" if self.place.depth is None else f" depth {self.place.depth:.2g}"
        return f"{super().label} {self.task.name}{depth}"

    @property
    def pass_lengths(self) -> list[int]:
        return [self.context] * len(self.seeds)

    def row_recipes(self) -> list[dict[str, Any]]:
        return [self.recipe | {"seed": seed} for seed in self.seeds]

    def measure(self, model: MeasuredModel, run: Run, advance: Advance) -> list[Row]:
        rows = []
        for recipe in self.row_recipes():
            row = run.find(recipe)  # stored by an earlier run that was stopped within this cell
            if row is None:
                row = run.add(recipe, self._trial(model, recipe["seed"], advance))
            else:
                advance(0, self.context)
            rows.append(row)
        return rows

    def _trial(self, model: MeasuredModel, seed: int, advance: Advance) -> dict[str, Any]:
        started = time.perf_counter()
        trial = assemble(self.task, model.tokenizer, self.place, seed)
        self.before(trial)
        output = model.run_trial(trial, advance)
        read = len(trial.prompt_ids) + len(trial.answer_ids) - 1
        advance(read, self.context - read)  # the written answer, and the rest of the length
        total = None if output.logprobs is None else sum(output.logprobs)
        written = self.task.mark(output.written, trial.answers)
        chosen: dict[str, Any] = {"correct": written}
        if trial.choices:
            chose, margin = trial.choose(output.choice_logprobs)
            chosen = {"correct": chose, "choice_margin": margin, "correct_written": written}
        return chosen | {
            "answer": trial.target,
            "generated": output.written,
            "answer_logprob": total,
            "answer_logprob_per_token": None if total is None else total / len(trial.answer_ids),
            "answer_is_likeliest": output.is_likeliest,
            "answer_tokens": len(trial.answer_ids),
            "prompt_tokens": len(trial.prompt_ids),
            "actual_depth": trial.depth,
            "prompt_sha256": trial.sha256,
            "seconds": time.perf_counter() - started,
            "peak_memory_mb": model.memory_mb,
        }

    def outcome(self, rows: Sequence[Row]) -> str:
        right = f"{fmean(row['correct'] for row in rows):.0%} of {len(rows)}"
        nats = [row["answer_logprob_per_token"] for row in rows if row["answer_logprob_per_token"] is not None]
        return f"{right}, {fmean(nats):+.2f} nats per token" if nats else right


def cells(
    model: MeasuredModel,
    tasks: Sequence[Task],
    scalers: Sequence[Scaler],
    *,
    contexts: Sequence[int],
    depths: Sequence[float] = (),
    trials: int = 20,
    text: Text | None = None,
    before: Callable[[Trial], None] = lambda _: None,
) -> list[RetrievalCell]:
    """Cells of every scaler, length, task and depth, in that order. Every scaler is first checked
    against the model.

    Args:
        depths: for tasks with a depth, 0 to 1. In other tasks the seed chooses the positions.
        trials: number of seeds 0, 1, ... of each cell.
        text: the haystack.

    Raises:
        ConfigError: a scaler cannot work on this model, or a depth is missing or not between 0 and
            1.
        DataError: a length cannot hold a prompt of some task, or the text is too short for it.
        ContextOverflow: a length is more than the model can hold.
    """
    if wrong := [depth for depth in depths if not 0 <= depth <= 1]:
        raise ConfigError(f"depth {wrong[0]:g} must lie between 0 (the beginning) and 1 (the end)")
    if not depths and (with_depth := [task.name for task in tasks if task.has_depth]):
        raise ConfigError(f"{with_depth[0]} needs the depth of its needle; give at least one, such as 0.5")
    ropes: dict[tuple[Scaler, int], dict[str, str]] = {}
    for scaler in scalers:
        scaled = model.under(scaler)
        ropes |= {(scaler, context): rope_recipe(scaler, scaled.rope_at, [context]) for context in contexts}
    for context in contexts:
        model.check(context)
    shared = shared_recipe(model, text)
    places = [
        (task, Place(context=context, depth=depth, text=text if task.needs_text else None))
        for context in contexts
        for task in tasks
        for depth in (depths if task.has_depth else (None,))
    ]
    for context in contexts:  # raises before anything is measured
        at = [(task, place) for task, place in places if place.context == context]
        check_smallest(at, context, model.tokenizer, range(trials))
    for task, place in places:
        if assemble(task, model.tokenizer, place, 0).choices:
            model.check_scoring(place.context)
    return [
        RetrievalCell(
            scaler=scaler,
            context=place.context,
            task=task,
            place=place,
            recipe=shared
            | task.settings
            | {
                "task": task.name,
                "suite": SUITE_OF[task.name],
                "context": place.context,
                "depth": place.depth,
            }
            | ropes[scaler, place.context],
            seeds=tuple(range(trials)),
            before=before,
        )
        for scaler in scalers
        for task, place in places
    ]


def rebuild(row: Row, tokenizer: Any, text: Text | None = None) -> Trial:
    """The exact trial that a row of a retrieval run was measured on.

    Args:
        row: a row of results.jsonl.
        tokenizer: the tokenizer of the model.
        text: the haystack. None: the text with the name in the row is loaded.

    Raises:
        DataError: it is no retrieval row, or the rebuilt prompt differs from the prompt of the row.
    """
    task = TASKS.get(str(row.get("task")))
    if task is None:
        raise DataError(f"a row of task {row.get('task')!r} has no prompt; a row of these has: {', '.join(TASKS)}")
    if task.needs_text and text is None:
        text = load_text(row["text"])
    if text is not None and task.needs_text and text.sha256 != row["text_sha256"]:
        raise DataError(f"the text {text.name} has sha256 {text.sha256}, the row was measured on {row['text_sha256']}")
    settings = {name: row.get(name) for name in task.settings}
    if settings != task.settings:
        raise DataError(f"the row was measured with {settings}, this installation has {task.settings}")
    place = Place(context=row["context"], depth=row["depth"], text=text if task.needs_text else None)
    trial = assemble(task, tokenizer, place, row["seed"])
    if trial.sha256 != row["prompt_sha256"]:
        raise DataError(
            f"the rebuilt prompt has sha256 {trial.sha256}, the row has {row['prompt_sha256']}; use the tokenizer "
            f"of {row['model']} and the versions in env.json"
        )
    return trial
