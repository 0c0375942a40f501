"""What `auto` stands for on one model, at every length."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..scaling.lengths import format_length
from ..scaling.positions import ReRoPE
from ..scaling.rope import RopeSpec, Scaler
from ..scaling.temperature import LogN
from ..scaling.yarn import YaRN
from .tuned_scalers import TunedScaler


@dataclass(frozen=True, kw_only=True)
class Step:
    """A scaler up to a length.

    Attributes:
        target: tokens up to which it is taken.
        why: where it comes from, in a few words.
    """

    target: int
    scaler: Scaler
    why: str


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The scaler for every length: the untouched model, what was tuned, and beyond that a default.

    Attributes:
        trained_length: tokens that the model reads untouched.
        steps: what was tuned, the smallest target first.
        default: for lengths beyond all of them; None is YaRN with the factor that a length needs.
        plain_length: tokens that YaRN's factor counts from.
    """

    trained_length: int
    steps: tuple[Step, ...]
    default: Scaler | None
    plain_length: int

    @classmethod
    def of(
        cls, rope: RopeSpec, trained_length: int, tunings: Sequence[TunedScaler], takes: Callable[[Scaler], bool]
    ) -> Choice:
        """For a model.

        Args:
            rope: its geometry before any scaling of its own.
            trained_length: tokens that it reads untouched.
            tunings: the smallest target first.
            takes: whether the model, as it was loaded, can be put under a scaler.
        """
        default = ReRoPE(window=max(1, trained_length // 2)) | LogN()
        steps = [step for tuning in tunings if (step := _step(tuning, takes)) is not None]
        return cls(
            trained_length=trained_length,
            steps=tuple(steps),
            default=default if takes(default) else None,
            plain_length=rope.trained_length,
        )

    def at(self, length: int | None) -> Scaler:
        """The scaler for a request of `length` tokens; None is within the trained length."""
        if length is None or length <= self.trained_length:
            return Scaler()
        for step in self.steps:
            if length <= step.target:
                return step.scaler
        return self.default or YaRN(factor=float(math.ceil(length / self.plain_length)))

    def __str__(self) -> str:
        parts = [f"up to {format_length(self.trained_length)} the untouched model"]
        parts += [f"up to {format_length(step.target)} {step.scaler} ({step.why})" for step in self.steps]
        if self.default is None:
            parts.append("beyond yarn by the length (the default of a model that takes no position map)")
        else:
            parts.append(f"beyond {self.default} (the default)")
        return ", ".join(parts)


def _step(tuning: TunedScaler, takes: Callable[[Scaler], bool]) -> Step | None:
    """The winner, or where the model does not take it the best that a config can hold."""
    if takes(tuning.winner):
        return Step(target=tuning.target, scaler=tuning.winner, why=f"tuned on {tuning.text}")
    if tuning.servable is not None and takes(tuning.servable):
        why = f"tuned on {tuning.text}; {tuning.winner}, which was better, is refused by the model as it is loaded"
        return Step(target=tuning.target, scaler=tuning.servable, why=why)
    return None
