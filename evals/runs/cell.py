"""What a run is made of: cells. A cell is measured as a whole, and gives one or more rows of the result."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...engine.model import Model
from ...scaling.lengths import format_length
from ...scaling.rope import Scaler
from .result import Row, Run

if TYPE_CHECKING:
    from ..models.subject import Subject

Advance = Callable[[int, int], None]
"""Called with the tokens that a cache held and how many have just been read on top of them."""


class Cell(ABC):
    """A unit of work: done as a whole or not at all, by one process.

    Attributes:
        scaler: what the subject is put under.
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
    def measure(self, subject: Subject, run: Run, advance: Advance) -> list[Row]:
        """Measure it under the scaler that `subject` has, store its rows in `run` and return them."""

    @abstractmethod
    def outcome(self, rows: Sequence[Row]) -> str:
        """What came out, in a few words: `loss 3.512, 1024 tokens scored`."""

    def is_ready(self, run: Run) -> bool:
        """False while it needs what another cell has yet to measure."""
        return True

    def is_done(self, run: Run) -> bool:
        """True if all its rows are in the results."""
        return all(run.find(recipe) is not None for recipe in self.row_recipes())


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Arithmetic of a forward pass, for time left: a dense part a token and an attention part a token and key."""

    dense: float
    attention: float

    @classmethod
    def of(cls, model: Model) -> Cost:
        """Operations from the model's shapes."""
        embedding = model.hf.get_input_embeddings().weight.numel()
        return cls._of(model.hf.config, sum(p.numel() for p in model.hf.parameters()) - embedding)

    @classmethod
    def of_config(cls, config: Any) -> Cost:
        """Operations of a model whose weights nobody has counted: 12 matrices of the hidden size squared a layer."""
        text = config.get_text_config()
        return cls._of(config, 12 * text.num_hidden_layers * text.hidden_size**2)

    @classmethod
    def _of(cls, config: Any, weights: int) -> Cost:
        config = config.get_text_config()
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(dense=2 * weights, attention=4 * config.num_hidden_layers * config.num_attention_heads * head_dim)

    def step(self, past: int, tokens: int) -> float:
        """Operations of `tokens` tokens on top of `past`."""
        return tokens * (self.dense + self.attention * (past + tokens / 2))

    def cell(self, cell: Cell) -> float:
        """Operations of a cell."""
        return sum(self.step(0, tokens) for tokens in cell.windows)
