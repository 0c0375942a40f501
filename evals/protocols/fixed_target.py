"""Protocols that score the last tokens of windows that end at the same places: `fixed-target` and
`repeat`."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from ...errors import ConfigError, Setting
from ..models.measured import Advance, MeasuredModel, Start, Tokens
from ..runs.result import Row
from ..statistics import paired_difference
from .protocol import Protocol, ProtocolResult, Window, too_short


def usual_target(contexts: Sequence[int], most: int = 1024) -> int:
    """The default number of scored tokens: `most`, but at most half of the shortest context."""
    return max(1, min(most, min(contexts, default=2) // 2))


def _room(context: int, start: Start) -> int:
    return context - max(len(start.prefix), 1)


@dataclass(frozen=True, kw_only=True)
class SamePlaces(Protocol):
    """Base of the protocols whose windows end at the same places for every context.

    Args:
        samples: places in the text. There are fewer if they would score the same tokens.
    """

    samples: int = 1

    @abstractmethod
    def scored_tokens(self, room: int) -> int:
        """Number of scored tokens at the end of a window.

        Args:
            room: tokens of the window that have a token before them and are of the text.
        """

    @property
    def limit(self) -> int | None:
        return None  # the places depend on the length of the document

    def is_enough(self, documents: Sequence[Tokens]) -> bool:
        return sum(len(d) >= self.longest for d in documents) >= self.samples

    def windows(self, documents: Sequence[Tokens], context: int, start: Start) -> list[Window]:
        room = _room(context, start)
        target = self.scored_tokens(room)
        if target > room:
            raise ConfigError(
                Setting("target", target, "given"), f" leaves no context within {context} tokens; score fewer tokens"
            )
        windows = []
        for number, end in self._places(documents, start):
            ids = start.prefix + documents[number][end - context + len(start.prefix) : end]
            windows.append(Window(ids=ids, first=len(ids) - target, place=f"{number}:{end}"))
        return windows

    def _places(self, documents: Sequence[Tokens], start: Start) -> list[tuple[int, int]]:
        """The document and the end of each window.

        Let D be the number of documents that hold the longest context. Sample k ends at the
        fraction (k // D + 1) / ceil(samples / D) of document k mod D. A sample that would score
        tokens of the previous sample in its document is left out.
        """
        body = self.longest - len(start.prefix)
        usable = [number for number, doc in enumerate(documents) if len(doc) >= body]
        if not usable:
            raise too_short(documents, self.longest)
        rounds = math.ceil(self.samples / len(usable))
        most = max(self.scored_tokens(_room(context, start)) for context in self.contexts)
        places: list[tuple[int, int]] = []
        last: dict[int, int] = {}
        for k in range(self.samples):
            number = usable[k % len(usable)]
            end = max(len(documents[number]) * (k // len(usable) + 1) // rounds, body)
            if number not in last or end - last[number] >= most:
                places.append((number, end))
                last[number] = end
        return places


@dataclass(frozen=True, kw_only=True)
class SameTarget(SamePlaces):
    """Base of the protocols that score the same tokens at every context.

    Args:
        target: number of scored tokens at the end of each window.
    """

    target: int

    def scored_tokens(self, room: int) -> int:
        return self.target


@dataclass(frozen=True, kw_only=True)
class FixedTarget(SameTarget):
    """The loss of the same last tokens at every context. The curve shows only the effect of
    context."""

    name: ClassVar[str] = "fixed-target"

    @classmethod
    def scored(cls, row: Row) -> str:
        return f"the same last {row.get('target')} tokens at every context"


@dataclass(frozen=True, kw_only=True)
class Repeat(SameTarget):
    """The loss on a passage A that the window begins with: [A][gap][A], compared with [X][gap][A].

    X, the gap and the last A are the text itself, so the second window is that of `fixed-target`.
    In the first window, A replaces X. The gain is the loss with X minus the loss with A, paired
    token by token. (After the repeated and non-repeated tests of kexue.fm/archives/9706.)
    """

    name: ClassVar[str] = "repeat"
    passes: ClassVar[int] = 2

    def windows(self, documents: Sequence[Tokens], context: int, start: Start) -> list[Window]:
        front = len(start.prefix)
        if context - front < 2 * self.target:
            raise ConfigError(
                Setting("target", self.target, "given"),
                f" does not fit twice into {context} tokens; score fewer or give more context",
            )
        return [
            replace(w, ids=w.ids[:front] + w.ids[w.first :] + w.ids[front + self.target :], twin=w.ids)
            for w in super().windows(documents, context, start)
        ]

    def measure(self, model: MeasuredModel, windows: Sequence[Window], advance: Advance) -> ProtocolResult:
        repeated = [model.losses(w.ids, w.first, advance) for w in windows]
        fresh = np.concatenate([model.losses(w.twin, w.first, advance) for w in windows if w.twin])
        gain, low, high = paired_difference(fresh, np.concatenate(repeated))
        extra = {"fresh_loss": float(fresh.mean(dtype=np.float64)), "gain": gain, "gain_low": low, "gain_high": high}
        return ProtocolResult(losses=repeated, extra=extra)

    @classmethod
    def scored(cls, row: Row) -> str:
        return f"the last {row['target']} tokens, which are also at the beginning of every window"
