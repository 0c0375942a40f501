"""Which scaler `rope="auto"` uses at which length of a request."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..scaling.lengths import format_length
from ..scaling.positions import SelfExtend
from ..scaling.rope import RopeSpec, Scaler
from ..scaling.yarn import YaRN
from .tuned_scalers import TunedScaler

GROUP = 8
"""Self-Extend's smallest group. With a window of half of the trained length it reaches 4.5 times that length."""

MARGIN = 2
"""What a scaler must reach, over the length of the request: near the end of its reach a model finds less of what stands
far back, which its loss does not show."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """A scaler for requests up to a length.

    Attributes:
        target: tokens of the longest request that uses it.
        why: where it comes from, in a few words.
    """

    target: int
    scaler: Scaler
    why: str


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The scaler for every length: none within the trained length, then tuned scalers, then a default.

    Attributes:
        rope: the model's geometry before any scaling of its own.
        trained_length: tokens that the model reads without a scaler.
        steps: the tuned scalers, the smallest target first.
        takes_maps: whether the model accepts Self-Extend, the default. If not, the default is YaRN.
    """

    rope: RopeSpec
    trained_length: int
    steps: tuple[Step, ...]
    takes_maps: bool

    @classmethod
    def of(
        cls, rope: RopeSpec, trained_length: int, tunings: Sequence[TunedScaler], takes: Callable[[Scaler], bool]
    ) -> Choice:
        """The choice for a model.

        Args:
            rope: its geometry before any scaling of its own.
            trained_length: tokens that it reads without a scaler.
            tunings: the smallest target first.
            takes: whether the model accepts a scaler, with the options that it was loaded with.
        """
        steps = [step for tuning in tunings if (step := _step(tuning, takes)) is not None]
        return cls(
            rope=rope,
            trained_length=trained_length,
            steps=tuple(steps),
            takes_maps=takes(self_extend(rope, trained_length)),
        )

    def at(self, length: int | None) -> Scaler:
        """The scaler for a request of `length` tokens. None means a length within the trained one."""
        if length is None or length <= self.trained_length:
            return Scaler()
        for step in self.steps:
            if length <= step.target:
                return step.scaler
        if self.takes_maps:
            return self_extend(self.rope, self.trained_length, length)
        return YaRN(factor=float(math.ceil(length / self.rope.trained_length)))

    def __str__(self) -> str:
        parts = [f"up to {format_length(self.trained_length)} the untouched model"]
        parts += [f"up to {format_length(step.target)} {step.scaler} ({step.why})" for step in self.steps]
        if self.takes_maps:
            default = self_extend(self.rope, self.trained_length)
            longest = format_length(int(default.reach(replace(self.rope, trained_length=self.trained_length)) / MARGIN))
            parts.append(f"beyond {default} (the default; its group is doubled where a text is longer than {longest})")
        else:
            parts.append("beyond yarn by the length (the default of a model that takes no position map)")
        return ", ".join(parts)


def self_extend(rope: RopeSpec, trained_length: int, length: int = 0) -> SelfExtend:
    """What `auto` uses beyond the trained length. docs/choose.md says why.

    Args:
        rope: the model's geometry.
        trained_length: tokens that the model reads without a scaler.
        length: tokens of the request. The group is `GROUP`, doubled until the scaler reaches `MARGIN` times as far.
    """
    geometry = replace(rope, trained_length=trained_length)
    scaler = SelfExtend(group=GROUP, window=max(1, trained_length // 2))
    while scaler.reach(geometry) < MARGIN * length:
        scaler = replace(scaler, group=2 * scaler.group)
    return scaler


def _step(tuning: TunedScaler, takes: Callable[[Scaler], bool]) -> Step | None:
    """The winner of a tuning. If the model refuses it, the best scaler that a config can hold."""
    if takes(tuning.winner):
        return Step(target=tuning.target, scaler=tuning.winner, why=f"tuned on {tuning.text}")
    if tuning.servable is not None and takes(tuning.servable):
        why = f"tuned on {tuning.text}; {tuning.winner}, which was better, is refused by the model as it is loaded"
        return Step(target=tuning.target, scaler=tuning.servable, why=why)
    return None
