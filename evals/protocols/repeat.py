"""A passage that was read before: does the model use it?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from ...errors import ConfigError
from ..models.reader import Reader, Start, Tokens
from ..runs.cell import Advance
from ..runs.result import Row
from ..statistics import paired_difference
from .fixed_target import SameTarget
from .protocol import Measured, Window


@dataclass(frozen=True, kw_only=True)
class Repeat(SameTarget):
    """The loss on a passage A that the window began with: [A][gap][A], against [X][gap][A].

    X, the gap and the last A are the text as it is, so the second window is that of `fixed-target`; in the first, A
    takes the place of X. The gain is the loss with X less the loss with A, paired token by token. (After the repeated
    and non-repeated tests of kexue.fm/archives/9706.)
    """

    name: ClassVar[str] = "repeat"
    passes: ClassVar[int] = 2

    def windows(self, documents: Sequence[Tokens], context: int, start: Start) -> list[Window]:
        front = len(start.prefix)
        if context - front < 2 * self.target:
            raise ConfigError(
                f"target {self.target} twice does not fit {context} tokens; ask for fewer scored tokens or more context"
            )
        return [
            replace(w, ids=w.ids[:front] + w.ids[w.first :] + w.ids[front + self.target :], twin=w.ids)
            for w in super().windows(documents, context, start)
        ]

    def measure(self, reader: Reader, windows: Sequence[Window], advance: Advance) -> Measured:
        repeated = [reader.losses(w.ids, w.first, advance) for w in windows]
        fresh = np.concatenate([reader.losses(w.twin, w.first, advance) for w in windows if w.twin])
        gain, low, high = paired_difference(fresh, np.concatenate(repeated))
        extra = {"fresh_loss": float(fresh.mean(dtype=np.float64)), "gain": gain, "gain_low": low, "gain_high": high}
        return Measured(losses=repeated, extra=extra)

    @classmethod
    def scored(cls, row: Row) -> str:
        return f"the last {row['target']} tokens, with which every window begins too"
