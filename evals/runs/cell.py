"""A cell, the unit of work of a run, and the fields that the recipes of all cells share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from ...scaling.lengths import format_length
from ...scaling.rope import Scaler
from ...scaling.spec import Auto
from ..models.measured import Advance, MeasuredModel
from .result import Row, Run


class Cell(ABC):
    """A unit of work that one process measures as a whole. It gives one or more rows.

    Attributes:
        scaler: the scaler under which the model is measured.
        context: tokens of its longest window or prompt.
    """

    scaler: Scaler
    context: int

    @property
    def label(self) -> str:
        """What it measures besides the scaler, for display: `8k`."""
        return format_length(self.context)

    @property
    @abstractmethod
    def pass_lengths(self) -> Sequence[int]:
        """Tokens of each forward pass."""

    @abstractmethod
    def row_recipes(self) -> list[dict[str, Any]]:
        """The recipe of each of its rows."""

    @abstractmethod
    def measure(self, model: MeasuredModel, run: Run, advance: Advance) -> list[Row]:
        """Measure the model under the cell's scaler, store the rows in `run` and return them."""

    @abstractmethod
    def outcome(self, rows: Sequence[Row]) -> str:
        """The result in a few words: `loss 3.512, 1024 tokens scored`."""

    def is_ready(self, run: Run) -> bool:
        """False while it needs the rows of another cell that is not measured yet."""
        return True

    def is_done(self, run: Run) -> bool:
        """True if all its rows are in the results."""
        return all(run.find(recipe) is not None for recipe in self.row_recipes())


class NamedText(Protocol):
    """A text as recipes name it: a `Text` or a `Source`."""

    @property
    def name(self) -> str: ...
    @property
    def sha256(self) -> str: ...


def shared_recipe(model: MeasuredModel, text: NamedText | None) -> dict[str, Any]:
    """The fields of the model and the text that every recipe has."""
    return {
        "model": model.name,
        "text": None if text is None else text.name,
        "text_sha256": None if text is None else text.sha256,
        "dtype": model.precision,
        "device": model.device,
        "trained_length": model.trained_length,
        **model.metadata,
    }


def rope_recipe(scaler: Scaler, rope_at: Callable[[int], Scaler], lengths: Iterable[int]) -> dict[str, str]:
    """The fields of the scaler.

    Args:
        rope_at: returns the scaler at a length. `auto` chooses by length and by what was tuned, so
            the recipe names the choice.
        lengths: in tokens.
    """
    if not isinstance(scaler, Auto):
        return {"rope": str(scaler)}
    return {"rope": str(scaler), "chosen": ", ".join(dict.fromkeys(str(rope_at(length)) for length in lengths))}
