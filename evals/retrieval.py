"""Retrieval: trials in cells, each scored twice from one reading of its prompt."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch

from ..engine.api import Model
from ..engine.cache import can_rewind
from ..engine.prefill import prefill
from ..engine.sampling import SamplingParams
from ..errors import ConfigError
from ..scaling.rope import Scaler
from .cell import Advance, Cell
from .data import Text
from .memory import peak_memory_mb
from .result import Row, Run
from .task import Place, Task
from .tasks import SUITE_OF
from .trial import Trial, assemble


@dataclass(frozen=True, kw_only=True)
class Heard:
    """What a model made of a trial.

    Args:
        logprobs: nats of each token of the right answer, given the prompt and the answer's tokens before it.
        is_likeliest: every token of the right answer was the likeliest one.
        written: its own answer, greedily.
    """

    logprobs: list[float]
    is_likeliest: bool
    written: str


def listen(model: Model, trial: Trial, advance: Advance | None = None) -> Heard:
    """Read the prompt once, score the right answer behind it, and let the model write its own from there.

    A cache that cannot forget (a sliding window in transformers' own cache) makes it read the prompt twice.
    """
    length = len(trial.prompt_ids) + trial.new_tokens
    model.prepare(length)  # as `generate_ids` will: a dynamic scaler must not change below the cache
    cache = model.new_cache(length)
    with torch.inference_mode():
        ids = trial.prompt_ids + trial.answer_ids[:-1]
        laws = prefill(model.network, ids, cache, advance, keep=len(trial.answer_ids)).float().log_softmax(-1).cpu()
    chosen = laws.gather(-1, torch.tensor(trial.answer_ids)[:, None])[:, 0]
    params = SamplingParams(max_new_tokens=trial.new_tokens, temperature=0)
    completion = model.generate_ids(trial.prompt_ids, params, cache if can_rewind(cache) else None)
    return Heard(
        logprobs=chosen.tolist(),
        is_likeliest=laws.argmax(-1).tolist() == trial.answer_ids,
        written=completion.text,
    )


@dataclass(frozen=True, kw_only=True)
class RetrievalCell(Cell):
    """The trials of one task under one scaler at one length and depth; each gives a row as soon as it is done.

    Args:
        recipe: of its rows, but for the seed.
        seeds: one for each trial.
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
    def windows(self) -> list[int]:
        return [self.context] * len(self.seeds)

    def row_recipes(self) -> list[dict[str, Any]]:
        return [self.recipe | {"seed": seed} for seed in self.seeds]

    def measure(self, model: Model, run: Run, advance: Advance) -> list[Row]:
        rows = []
        for recipe in self.row_recipes():
            row = run.find(recipe)  # of an earlier run that was stopped within this cell
            if row is None:
                row = run.add(recipe, self._trial(model, recipe["seed"], advance))
            else:
                advance(0, self.context)
            rows.append(row)
        return rows

    def _trial(self, model: Model, seed: int, advance: Advance) -> dict[str, Any]:
        started = time.perf_counter()
        trial = assemble(self.task, model.tokenizer, self.place, seed)
        self.before(trial)
        heard = listen(model, trial, advance)
        read = len(trial.prompt_ids) + len(trial.answer_ids) - 1
        advance(read, self.context - read)  # the writing, and what the prompt left free
        total = sum(heard.logprobs)
        return {
            "correct": self.task.mark(heard.written, trial.answers),
            "answer": trial.target,
            "generated": heard.written,
            "answer_logprob": total,
            "answer_logprob_per_token": total / len(heard.logprobs),
            "answer_is_likeliest": heard.is_likeliest,
            "answer_tokens": len(trial.answer_ids),
            "prompt_tokens": len(trial.prompt_ids),
            "actual_depth": trial.depth,
            "prompt_sha256": trial.sha256,
            "seconds": time.perf_counter() - started,
            "peak_memory_mb": peak_memory_mb(),
        }

    def outcome(self, rows: Sequence[Row]) -> str:
        right, nats = fmean(row["correct"] for row in rows), fmean(row["answer_logprob_per_token"] for row in rows)
        return f"{right:.0%} of {len(rows)}, {nats:+.2f} nats a token"


def cells(
    model: Model,
    tasks: Sequence[Task],
    scalers: Sequence[Scaler],
    *,
    contexts: Sequence[int],
    depths: Sequence[float] = (),
    trials: int = 20,
    text: Text | None = None,
    before: Callable[[Trial], None] = lambda _: None,
) -> list[RetrievalCell]:
    """Cells of every scaler, length, task and depth, in that order; every scaler is checked against the model first.

    Args:
        depths: for tasks with a depth, 0 to 1; the others leave the places to the seed.
        trials: seeds 0, 1, ... of each cell.
        text: the haystack.

    Raises:
        ConfigError: a scaler cannot work on this model, or a depth is not between 0 and 1.
        DataError: the shortest length does not hold a prompt of some task.
    """
    if wrong := [depth for depth in depths if not 0 <= depth <= 1]:
        raise ConfigError(f"depth {wrong[0]:g} must lie between 0 (the beginning) and 1 (the end)")
    for scaler in scalers:
        model.rope = scaler
    shared = {
        "model": model.name,
        "text": None if text is None else text.name,
        "text_sha256": None if text is None else text.sha256,
        "dtype": model.network.precision,
        "device": model.hf.device.type,
        "trained_length": model.trained_length,
    }
    places = [
        (task, Place(context=context, depth=depth, text=text if task.needs_text else None))
        for context in contexts
        for task in tasks
        for depth in (depths if task.has_depth else (None,))
    ]
    for task, place in places:
        assemble(task, model.tokenizer, place, 0)  # refuses a length that is too short before anything is measured
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
                "rope": str(scaler),
                "context": place.context,
                "depth": place.depth,
            },
            seeds=tuple(range(trials)),
            before=before,
        )
        for scaler in scalers
        for task, place in places
    ]
