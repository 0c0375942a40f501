"""What a run measures: a model in this process (`Local`), or one that is served elsewhere (`Endpoint`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from ...scaling.rope import Scaler
from ..retrieval.trial import Trial
from ..retrieval.trial_output import TrialOutput
from ..runs.cell import Advance, Cost
from .reader import Reader

if TYPE_CHECKING:
    from collections.abc import Mapping


class Subject(Protocol):
    """All that the harness asks of a model.

    Attributes:
        rope: the scaler in use. One that cannot work here raises ConfigError when it is assigned.
    """

    rope: Scaler

    def rope_at(self, length: int) -> Scaler:
        """The scaler for a request of `length` tokens: the one in use, or what `auto` stands for there."""

    @property
    def name(self) -> str:
        """Of the model, as its rows tell it."""

    @property
    def precision(self) -> str:
        """In which numbers it computes."""

    @property
    def device(self) -> str:
        """Where it does."""

    @property
    def trained_length(self) -> int:
        """Tokens that it was trained to read; what `2x` is a multiple of."""

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Further fields in the recipes of its rows, JSON scalars."""

    @property
    def tokenizer(self) -> Any:
        """Of transformers."""

    @property
    def cost(self) -> Cost:
        """Of its forward passes."""

    @property
    def memory_mb(self) -> float | None:
        """Most memory that it has held so far, MB; None where that is not known."""

    def reader(self) -> Reader:
        """It under the scaler in use, for losses.

        Raises:
            ConfigError: it gives none.
        """

    def run_trial(self, trial: Trial, advance: Advance) -> TrialOutput:
        """The right answer scored behind the trial's prompt, and what the model writes there itself."""

    def check(self, length: int) -> None:
        """Raise ContextOverflow unless `length` tokens, read and written together, can be asked for."""

    def time_forward(self, length: int) -> None:
        """Read some `length` tokens, for the time that it takes."""

    def needs(self, longest: int) -> str:
        """What prompts of up to `longest` tokens take beside time, in a few words."""
