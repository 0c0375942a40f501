"""Windows of several lengths that end at the same places, so that only the context of what is scored differs."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ...errors import ConfigError
from ..runs.result import Row
from ..subjects.reader import Start, Tokens
from .protocol import Protocol, Window, too_short


@dataclass(frozen=True, kw_only=True)
class SamePlaces(Protocol):
    """Base of the protocols whose windows of every length end at the same places.

    Args:
        samples: places in the text.
    """

    samples: int = 1

    @abstractmethod
    def scored_tokens(self, context: int) -> int:
        """Tokens scored at the end of a window."""

    @property
    def limit(self) -> int | None:
        return None  # the places depend on how long a document is

    def is_enough(self, documents: Sequence[Tokens]) -> bool:
        return sum(len(d) >= self.longest for d in documents) >= self.samples

    def windows(self, documents: Sequence[Tokens], context: int, start: Start) -> list[Window]:
        """Sample k ends at the (k // D + 1) / ceil(samples / D) part of document k mod D, over the D documents that
        hold the longest context."""
        target = self.scored_tokens(context)
        if target >= context:
            raise ConfigError(f"target {target} leaves no context within {context} tokens; ask for fewer scored tokens")
        room = self.longest - len(start.prefix)
        usable = [(n, doc) for n, doc in enumerate(documents) if len(doc) >= room]
        if not usable:
            raise too_short(documents, self.longest)
        rounds = math.ceil(self.samples / len(usable))
        windows = []
        for k in range(self.samples):
            number, doc = usable[k % len(usable)]
            end = max(len(doc) * (k // len(usable) + 1) // rounds, room)
            ids = start.prefix + doc[end - context + len(start.prefix) : end]
            windows.append(Window(ids=ids, first=len(ids) - target, place=f"{number}:{end}"))
        return windows


@dataclass(frozen=True, kw_only=True)
class SameTarget(SamePlaces):
    """Base of those that score the same tokens at every context.

    Args:
        target: tokens scored at the end of each window.
    """

    target: int = 1024

    def scored_tokens(self, context: int) -> int:
        return self.target


@dataclass(frozen=True, kw_only=True)
class FixedTarget(SameTarget):
    """The same last tokens under every context: a curve that is purely the effect of context."""

    name: ClassVar[str] = "fixed-target"

    @classmethod
    def scored(cls, row: Row) -> str:
        return f"the same last {row.get('target')} tokens at every context"
