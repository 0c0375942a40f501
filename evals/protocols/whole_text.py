"""Protocols whose windows cover a text, or begin at its start."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ...errors import ConfigError, DataError, Setting
from ...scaling.lengths import format_length
from ..models.measured import Start, Tokens
from ..runs.result import Row
from .protocol import Protocol, Window, too_short


@dataclass(frozen=True, kw_only=True)
class WholeText(Protocol):
    """Base of the protocols that read the text from its beginning.

    Args:
        text_tokens: number of tokens that are read, document by document.
    """

    text_tokens: int = 32768

    @property
    def limit(self) -> int | None:
        return self.text_tokens

    def is_enough(self, documents: Sequence[Tokens]) -> bool:
        return sum(map(len, documents)) >= self.text_tokens


@dataclass(frozen=True, kw_only=True)
class ByDocument(WholeText):
    """Base of the protocols whose windows do not cross the end of a document."""

    def windows(self, documents: Sequence[Tokens], context: int, start: Start) -> list[Window]:
        windows, left = [], self.text_tokens
        for number, doc in enumerate(documents):
            windows += self.of_document(doc[:left], number, context, start)
            left = max(left - len(doc), 0)
        if not windows:
            raise DataError("the text has fewer than 2 tokens, so there is nothing to score; give a longer text")
        return windows

    @abstractmethod
    def of_document(self, doc: Tokens, number: int, context: int, start: Start) -> list[Window]:
        """The windows of one document."""


@dataclass(frozen=True, kw_only=True)
class Sliding(ByDocument):
    """Windows that move by a stride. The first window of a document scores all tokens, each other
    window its new tokens.

    This follows transformers' documentation, with two differences: the last window of a document is
    as long as the others, and every scored token has the same weight in the mean.

    Args:
        stride: tokens by which the window moves.
    """

    name: ClassVar[str] = "sliding"
    stride: int = 256

    def of_document(self, doc: Tokens, number: int, context: int, start: Start) -> list[Window]:
        body, scored_to = context - len(start.prefix), 0
        if not 1 <= self.stride <= body:
            raise ConfigError(
                Setting("stride", self.stride, "given"),
                f" must be between 1 and {body}, the tokens of the text in a window of {context}",
            )
        windows = []
        for end in range(min(body, len(doc)), len(doc) + self.stride, self.stride):
            end = min(end, len(doc))
            ids = start.prefix + doc[max(0, end - body) : end]
            first = max(len(ids) - (end - scored_to), 1)
            if end > scored_to and first < len(ids):
                windows.append(Window(ids=ids, first=first, place=f"{number}:{end}"))
            scored_to = end
        return windows

    @classmethod
    def scored(cls, row: Row) -> str:
        return f"the new tokens of a window that slides by {row.get('stride')}"


@dataclass(frozen=True, kw_only=True)
class Disjoint(ByDocument):
    """Disjoint windows with one token of context, as in `loglikelihood_rolling` of
    lm-evaluation-harness.

    The start token (or else the end token) is put before each document. A window reads `context`
    tokens and scores as many, so that every token of the document is scored once. The last window
    scores the rest, with `context` tokens read. If the tokenizer has neither token, the first token
    of the document takes its place and is not scored.
    """

    name: ClassVar[str] = "disjoint"

    def of_document(self, doc: Tokens, number: int, context: int, start: Start) -> list[Window]:
        whole = doc if start.token is None else [start.token, *doc]
        windows = []
        for scored in range(1, len(whole), context):
            end = min(scored + context, len(whole))
            ids = whole[max(0, end - context - 1) : end]
            first, fed = len(ids) - (end - scored), len(ids) - 1
            windows.append(Window(ids=ids, first=first, place=f"{number}:{end}", length=fed))
        return windows

    @classmethod
    def scored(cls, row: Row) -> str:
        return "every token once, in windows that share one token"


@dataclass(frozen=True, kw_only=True)
class LlamaCpp(WholeText):
    """Chunks of the whole text. The second half of each chunk is scored, as in llama.cpp's
    `perplexity`.

    If the tokenizer adds a start token, it comes before the text and replaces the first token of
    every chunk. In a chunk of n tokens, those at n // 2 + 1 .. n - 1 are scored. A rest that is
    shorter than a chunk is left out.
    """

    name: ClassVar[str] = "llamacpp"

    def windows(self, documents: Sequence[Tokens], context: int, start: Start) -> list[Window]:
        if context < 3:
            raise ConfigError(f"context {context} leaves nothing to score in its second half; give at least 3")
        bos = start.prefix[:1]
        text = [*bos, *(token for doc in documents for token in doc)][: self.text_tokens]
        if len(text) < 2 * context:
            raise DataError(
                f"llamacpp needs two chunks: {2 * context} tokens of text for a context of {context}, but it has "
                f"{len(text)}; give a longer text, more text tokens or a shorter context"
            )
        ends = range(context, len(text) + 1, context)
        chunks = (text[end - context : end] for end in ends)
        return [
            Window(ids=bos + chunk[len(bos) :], first=context // 2 + 1, place=f"all:{end}")
            for end, chunk in zip(ends, chunks, strict=True)
        ]

    @classmethod
    def scored(cls, row: Row) -> str:
        return "the second half of each chunk"


@dataclass(frozen=True, kw_only=True)
class FromStart(Protocol):
    """The first `context` tokens of the first documents that are long enough; everything is scored.

    Args:
        samples: number of documents.
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
        first = max(len(start.prefix), 1)
        return [Window(ids=start.prefix + doc[:body], first=first, place=f"{n}:{body}") for n, doc in chosen]


@dataclass(frozen=True, kw_only=True)
class Truncate(FromStart):
    """The first tokens of each document, as in YaRN's figure 1 and tables 1, 2 and 6 (arXiv
    2309.00071)."""

    name: ClassVar[str] = "truncate"

    @classmethod
    def scored(cls, row: Row) -> str:
        return "the first tokens of each document"


@dataclass(frozen=True, kw_only=True)
class ByPosition(FromStart):
    """One long pass, in buckets of position that are powers of two. It shows where a method breaks
    down."""

    name: ClassVar[str] = "by-position"

    def buckets(self, context: int) -> list[tuple[int, int] | None]:
        return list(itertools.pairwise(position_edges(context)))

    @classmethod
    def scored(cls, row: Row) -> str:
        return f"every token of one pass over {format_length(row['context'])}, by position"


def position_edges(context: int) -> tuple[int, ...]:
    """Bucket edges 1, 256, 512, 1024, ... up to `context`. A bucket has the tokens at positions
    [start, end)."""
    edges = [1]
    while (edge := 128 * 2 ** len(edges)) < context:
        edges.append(edge)
    return (*edges, context)
