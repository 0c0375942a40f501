"""LongPPL: the perplexity of the tokens that need far context. A judge chooses them once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ...errors import ConfigError, DataError, Setting
from ...scaling.lengths import format_length
from ...scaling.rope import Scaler
from ...scaling.spec import parse
from ..models.measured import Advance, MeasuredModel
from ..runs.cell import Cell
from ..runs.result import Row, Run, loss_text
from .fixed_target import SameTarget
from .protocol import Window

GAIN = 2.0
"""The loss of a key token falls by more than this from the short to the full context, nats."""

MOST_LOSS = 2.0
"""The loss of a key token with the full context is below this, nats."""

LEAST_KEYS = 16
"""The smallest allowed number of key tokens."""


@dataclass(frozen=True, kw_only=True)
class LongPPL(SameTarget):
    """The loss of key tokens: the tokens that a judge predicts much better with the full context
    than with a short one.

    Key tokens have loss_short - loss_full > 2 and loss_full < 2 nats (Fang et al., arXiv
    2410.23771). Here loss_full is the judge's loss at the longest context, and loss_short its loss
    at the trained length. The same key tokens are scored for every scaler and context.

    Args:
        judge: the scaler under which the model chooses the key tokens.
    """

    name: ClassVar[str] = "longppl"
    judge: str = "dual-chunk"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "judge", str(parse(self.judge)))  # a canonical spelling, so that a run finds it again

    def check(self, model: MeasuredModel) -> None:
        model.under(parse(self.judge))  # raises if the scaler of the model is fixed
        L = model.trained_length
        if L is None:
            raise ConfigError("longppl uses the trained length as the short context; give trained_length")
        if self.longest <= L:
            raise ConfigError(
                f"longppl compares the longest context, {format_length(self.longest)}, with the trained length, "
                f"{format_length(L)}; give a longer one too"
            )

    @classmethod
    def scored(cls, row: Row) -> str:
        count = f"{row['tokens']} of {row['candidates']} tokens" if row.get("loss") is not None else "the tokens"
        return f"{count} that need far context, the same everywhere, chosen by {row['judge']} tokens"


@dataclass(frozen=True, kw_only=True)
class JudgeCell(Cell):
    """The judge's two passes over every place. Its losses are stored, and later cells read them.

    Args:
        scaler: the judge.
        context: the longest context, that of `full`.
        short: windows of the trained length.
        full: windows of the longest context.
        recipe: the recipe of both rows without the context.
    """

    scaler: Scaler
    context: int
    short: tuple[Window, ...]
    full: tuple[Window, ...]
    recipe: dict[str, Any]

    @property
    def label(self) -> str:
        return "judge"

    @property
    def pass_lengths(self) -> list[int]:
        return [len(w.ids) - 1 for w in (*self.short, *self.full)]

    def row_recipes(self) -> list[dict[str, Any]]:
        return [{**self.recipe, "context": len(windows[0].ids)} for windows in (self.short, self.full)]

    def measure(self, model: MeasuredModel, run: Run, advance: Advance) -> list[Row]:
        for recipe, windows in zip(self.row_recipes(), (self.short, self.full), strict=True):
            if run.find(recipe) is None:  # after a kill, one of the two may be stored
                losses = np.concatenate([model.losses(w.ids, w.first, advance) for w in windows])
                run.add(recipe, {"tokens": len(losses), "loss": float(losses.mean())}, losses)
        return [row for recipe in self.row_recipes() if (row := run.find(recipe)) is not None]

    def outcome(self, rows: Sequence[Row]) -> str:
        short, full = rows
        return ", ".join(f"{loss_text(row)} at {format_length(row['context'])}" for row in (short, full))

    def is_key(self, run: Run) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which of the scored tokens are key tokens, bool [tokens].

        Raises:
            DataError: the judge's losses are missing.
        """
        rows = [run.find(recipe) for recipe in self.row_recipes()]
        losses = [None if row is None else run.losses(row) for row in rows]
        if losses[0] is None or losses[1] is None:
            raise DataError(f"{run.folder} has no losses of the judge {self.scaler}; measure in another folder")
        return key_tokens(losses[0], losses[1])

    def keys(self, run: Run) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """The same.

        Raises:
            DataError: there are too few, or the judge's losses are missing.
        """
        is_key = self.is_key(run)
        if (count := int(is_key.sum())) < LEAST_KEYS:
            short, full = (format_length(recipe["context"]) for recipe in self.row_recipes())
            raise DataError(
                f"the judge {self.scaler} finds {count} key tokens among {len(is_key)} ({full} of context against "
                f"{short}); longppl needs at least {LEAST_KEYS}: score more tokens (",
                Setting("target", form="name"),
                ", ",
                Setting("samples", form="name"),
                "), or use a text whose tokens depend on far context",
            )
        return is_key


def key_tokens(
    short: np.ndarray[Any, np.dtype[Any]], full: np.ndarray[Any, np.dtype[Any]]
) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which tokens are key tokens, from their losses with both contexts, bool [tokens]."""
    is_key: np.ndarray[Any, np.dtype[np.bool_]] = (short - full > GAIN) & (full < MOST_LOSS)
    return is_key
