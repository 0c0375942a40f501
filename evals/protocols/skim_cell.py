"""A cell of skimming: the end of a long text, after a sample of what stands before it, under one scaler."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...engine.model import Model
from ...engine.runners.cpu.runner import CompiledRunner
from ...engine.runners.cpu.skim import Sample
from ...scaling.lengths import format_length
from ...scaling.rope import Scaler
from ..models.local import Local
from ..models.subject import Subject
from ..runs.cell import Advance, Cell
from ..runs.result import Row, Run, loss_text
from .protocol import Window, tokens_sha256


def can_skim(model: Model) -> bool:
    """True if `engine.skim` can run it."""
    return model.is_compiled


@dataclass(frozen=True, kw_only=True)
class SkimCell(Cell):
    """The last tokens of a window, as its sample lets them be predicted.

    Args:
        window: of `context` tokens.
        sample: of its tokens; the scored ones are its last.
        recipe: of its row.
    """

    scaler: Scaler
    context: int
    window: Window
    sample: Sample
    recipe: dict[str, Any]

    @property
    def label(self) -> str:
        return f"{format_length(len(self.sample.positions))} of {format_length(self.context)}"

    @property
    def windows(self) -> list[int]:
        return [len(self.sample.positions)]

    def row_recipes(self) -> list[dict[str, Any]]:
        return [self.recipe]

    def measure(self, subject: Subject, run: Run, advance: Advance) -> list[Row]:
        assert isinstance(subject, Local), "only a network in this process skims"
        model = subject.model
        started = time.perf_counter()
        ids = [self.window.ids[place] for place in self.sample.positions.tolist()]
        scored = ids[self.window.first - len(self.window.ids) :]
        with model.running(self.context) as runner:
            assert isinstance(runner, CompiledRunner)
            logits = runner.skim(ids, self.sample, len(scored) + 1)[:-1]
        losses = (logits.logsumexp(-1) - logits.gather(-1, torch.tensor(scored)[:, None])[:, 0]).numpy()
        advance(0, len(ids))
        measured = {
            "loss": float(losses.mean(dtype="float64")),
            "tokens_sha256": tokens_sha256(scored),
            "seconds": time.perf_counter() - started,
        }
        return [run.add(self.recipe, measured, losses)]

    def outcome(self, rows: Sequence[Row]) -> str:
        return f"{loss_text(rows[0])}, skimmed"
