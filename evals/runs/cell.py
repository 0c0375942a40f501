"""What a run is made of: cells. A cell is measured as a whole, and gives one or more rows of the
result."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from ...scaling.lengths import format_length
from ...scaling.rope import Scaler
from ..models.cost import Advance
from ..models.measured import MeasuredModel
from .result import Row, Run


class Cell(ABC):
    """A unit of work: done as a whole or not at all, by one process.

    Attributes:
        scaler: the scaler of the model that is measured.
        context: tokens of its longest window or prompt.
    """

    scaler: Scaler
    context: int

    @property
    def label(self) -> str:
        """What it is beside its scaler, for people: `8k`."""
        return format_length(self.context)

    @property
    @abstractmethod
    def windows(self) -> Sequence[int]:
        """Tokens of each forward pass."""

    @abstractmethod
    def row_recipes(self) -> list[dict[str, Any]]:
        """The recipe of each row that it gives."""

    @abstractmethod
    def measure(self, model: MeasuredModel, run: Run, advance: Advance) -> list[Row]:
        """Measure it on a model under its scaler, store its rows in `run` and return them."""

    @abstractmethod
    def outcome(self, rows: Sequence[Row]) -> str:
        """What came out, in a few words: `loss 3.512, 1024 tokens scored`."""

    def is_ready(self, run: Run) -> bool:
        """False while it needs what another cell has yet to measure."""
        return True

    def is_done(self, run: Run) -> bool:
        """True if all its rows are in the results."""
        return all(run.find(recipe) is not None for recipe in self.row_recipes())
