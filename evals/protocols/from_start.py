"""One pass from the start of each document: `by-position` and `truncate`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ...scaling.lengths import format_length
from ..models.reader import Start, Tokens
from ..runs.result import Row
from .protocol import Protocol, Window, too_short


@dataclass(frozen=True, kw_only=True)
class FromStart(Protocol):
    """The first `context` tokens of the first documents that hold as many; everything is scored.

    Args:
        samples: documents.
    """

    samples: int = 1

    def is_enough(self, documents: Sequence[Tokens]) -> bool:
        return sum(len(d) >= self.longest for d in documents) >= self.samples

    def windows(self, documents: Sequence[Tokens], context: int, start: Start) -> list[Window]:
        body = context - len(start.prefix)
        usable = [(n, doc) for n, doc in enumerate(documents) if len(doc) >= body]
        if len(usable) < self.samples:
            raise too_short(documents, context, self.samples)
        chosen = usable[: self.samples]
        return [Window(ids=start.prefix + doc[:body], first=1, place=f"{n}:{body}") for n, doc in chosen]


@dataclass(frozen=True, kw_only=True)
class Truncate(FromStart):
    """The first tokens of each document, as in YaRN's figure 1 and tables 1, 2 and 6 (arXiv 2309.00071)."""

    name: ClassVar[str] = "truncate"

    @classmethod
    def scored(cls, row: Row) -> str:
        return "the first tokens of each document"


@dataclass(frozen=True, kw_only=True)
class ByPosition(FromStart):
    """One long pass, in buckets of position that are powers of two: where a method breaks."""

    name: ClassVar[str] = "by-position"

    def buckets(self, context: int) -> list[tuple[int, int] | None]:
        return list(itertools.pairwise(position_edges(context)))

    @classmethod
    def scored(cls, row: Row) -> str:
        return f"every token of one pass over {format_length(row['context'])}, by position"


def position_edges(context: int) -> tuple[int, ...]:
    """Bucket edges 1, 256, 512, 1024, ... up to `context`: tokens at positions in [start, end)."""
    edges = [1]
    while (edge := 128 * 2 ** len(edges)) < context:
        edges.append(edge)
    return (*edges, context)
