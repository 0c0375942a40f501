"""Protocols of perplexity: which windows of a text are read, and which of their tokens are scored.

* `fixed-target` scores the same last tokens under every context length, so that only context differs;
* `by-position` scores one long pass in buckets of position, powers of two;
* `sliding` moves a window by a stride and scores the tokens new to it;
* `truncate` scores the first tokens of each document.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import ConfigError, DataError, did_you_mean
from ..scaling.lengths import format_length

Tokens = list[int]


@dataclass(frozen=True, kw_only=True)
class Window:
    """One forward pass: token ids, and the index of the first one scored (to the end)."""

    ids: Tokens
    first: int
    place: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to measure, before it is tokenised.

    Args:
        protocol: one of PROTOCOLS.
        contexts: window lengths in tokens.
        target: fixed-target only: tokens scored at the end of each window.
        samples: fixed-target: places in the text; by-position and truncate: documents.
        stride: sliding only: tokens by which the window moves.
        text_tokens: sliding only: tokens of the text that are scored.
    """

    protocol: str = "fixed-target"
    contexts: tuple[int, ...]
    target: int = 1024
    samples: int = 1
    stride: int = 256
    text_tokens: int = 32768

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise ConfigError(f"unknown protocol {self.protocol!r}.{did_you_mean(self.protocol, PROTOCOLS)}")
        for name in ("target", "samples", "stride", "text_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} {getattr(self, name)} must be at least 1")
        if not self.contexts or min(self.contexts) < 2:
            raise ConfigError("give at least one context of 2 tokens or more")

    @property
    def settings(self) -> dict[str, int]:
        """The fields that this protocol looks at."""
        return {name: getattr(self, name) for name in PROTOCOLS[self.protocol]}

    def windows(self, documents: Sequence[Tokens], context: int, prefix: Tokens) -> list[Window]:
        """The windows of one context length; `prefix` is what the tokenizer puts before a text."""
        if self.protocol == "fixed-target":
            longest = max(self.contexts)
            return fixed_target(documents, context, longest=longest, prefix=prefix, **self.settings)
        if self.protocol == "sliding":
            return sliding(documents, context, prefix=prefix, **self.settings)
        return from_start(documents, context, prefix=prefix, **self.settings)


PROTOCOLS: dict[str, tuple[str, ...]] = {
    "fixed-target": ("target", "samples"),
    "by-position": ("samples",),
    "sliding": ("stride", "text_tokens"),
    "truncate": ("samples",),
}
"""Protocols, and the fields of `Plan` that each looks at."""


def fixed_target(
    documents: Sequence[Tokens], context: int, *, target: int, samples: int, longest: int, prefix: Tokens
) -> list[Window]:
    """Windows of `context` tokens that end at the same places for every context up to `longest`.

    Sample k ends at the (k // D + 1) / ceil(samples / D) part of document k mod D, over the D documents that hold
    `longest` tokens. The last `target` tokens of each window are scored.
    """
    if target >= context:
        raise ConfigError(f"target {target} leaves no context within {context} tokens; ask for fewer scored tokens")
    usable = [(n, doc) for n, doc in enumerate(documents) if len(doc) + len(prefix) >= longest]
    if not usable:
        raise _too_short(documents, longest)
    rounds = math.ceil(samples / len(usable))
    windows = []
    for k in range(samples):
        number, doc = usable[k % len(usable)]
        end = max(len(doc) * (k // len(usable) + 1) // rounds, longest - len(prefix))
        ids = prefix + doc[end - context + len(prefix) : end]
        windows.append(Window(ids=ids, first=len(ids) - target, place=f"{number}:{end}"))
    return windows


def from_start(documents: Sequence[Tokens], context: int, *, samples: int, prefix: Tokens) -> list[Window]:
    """The first `context` tokens of the first `samples` documents that hold as many; everything scored."""
    body = context - len(prefix)
    usable = [(n, doc) for n, doc in enumerate(documents) if len(doc) >= body]
    if len(usable) < samples:
        raise _too_short(documents, context, samples)
    return [Window(ids=prefix + doc[:body], first=1, place=f"{n}:{body}") for n, doc in usable[:samples]]


def sliding(
    documents: Sequence[Tokens], context: int, *, stride: int, text_tokens: int, prefix: Tokens
) -> list[Window]:
    """Windows of `context` tokens moved by `stride` over the first `text_tokens` tokens of the text, document by
    document; the first window of a document scores everything, the others their last `stride` tokens."""
    if not 1 <= stride <= context - len(prefix):
        raise ConfigError(f"stride {stride} must be between 1 and the context {context}")
    windows, left = [], text_tokens
    for number, doc in enumerate(documents):
        doc = doc[:left]
        left -= len(doc)
        body, scored_to = context - len(prefix), 0
        for end in range(min(body, len(doc)), len(doc) + stride, stride):
            end = min(end, len(doc))
            ids = prefix + doc[max(0, end - body) : end]
            first = max(len(ids) - (end - scored_to), 1)
            if end > scored_to and first < len(ids):
                windows.append(Window(ids=ids, first=first, place=f"{number}:{end}"))
            scored_to = end
    if not windows:
        raise DataError("the text has fewer than 2 tokens; there is nothing to score")
    return windows


def _too_short(documents: Sequence[Tokens], needed: int, count: int = 1) -> DataError:
    longest = max((len(d) for d in documents), default=0)
    have = sum(len(d) >= needed for d in documents)
    return DataError(
        f"the text is too short: {count} document(s) of {format_length(needed)} tokens needed, {have} there, the "
        f"longest of {longest} tokens; ask for shorter lengths or a longer text"
    )


def position_edges(context: int) -> tuple[int, ...]:
    """Bucket edges 1, 256, 512, 1024, ... up to `context`: tokens at positions in [start, end)."""
    edges = [1]
    while (edge := 128 * 2 ** len(edges)) < context:
        edges.append(edge)
    return (*edges, context)
