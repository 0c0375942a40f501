"""The base class of perplexity protocols: which windows of a text are read, and which tokens are
scored."""

from __future__ import annotations

import dataclasses
import hashlib
import operator
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from ...errors import ConfigError, DataError, Setting
from ...scaling.lengths import format_length
from ..models.measured import Advance, MeasuredModel, Start, Tokens
from ..runs.result import Losses, Row


@dataclass(frozen=True, kw_only=True)
class Window:
    """One forward pass: token ids, and the index of the first scored token. All later tokens are
    scored too.

    Args:
        place: where the window ends, `document:token`.
        length: tokens that the scaler is for, if it is not the number of `ids`.
        twin: ids of a second pass that scores the same tokens; None if there is none.
    """

    ids: Tokens
    first: int
    place: str
    length: int | None = None
    twin: Tokens | None = None


@dataclass(frozen=True, kw_only=True)
class ProtocolResult:
    """The result of some windows.

    Args:
        losses: nats of the scored tokens, window by window.
        extra: further fields of the row.
    """

    losses: list[Losses]
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Protocol(ABC):
    """Base of the protocols. They are frozen and keyword-only, and have only the fields that they
    use.

    Args:
        contexts: window lengths in tokens.
    """

    name: ClassVar[str]
    passes: ClassVar[int] = 1  # forward passes for each window
    contexts: tuple[int, ...]

    def __post_init__(self) -> None:
        for field_ in dataclasses.fields(self):
            value = getattr(self, field_.name)
            if field_.type == "int" or (field_.type == "int | None" and value is not None):
                try:
                    object.__setattr__(self, field_.name, operator.index(value))  # numpy's integers become Python's
                except TypeError:
                    raise ConfigError(Setting(field_.name, repr(value), "given"), " must be a whole number") from None
                if value < 1:
                    raise ConfigError(Setting(field_.name, value, "given"), " must be at least 1")
        if not self.contexts or min(self.contexts) < 2:
            raise ConfigError("give at least one context of 2 tokens or more")

    @property
    def settings(self) -> dict[str, Any]:
        """Its fields except the contexts."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del values["contexts"]
        return values

    @property
    def longest(self) -> int:
        """The longest context."""
        return max(self.contexts)

    @property
    def limit(self) -> int | None:
        """The most tokens of a document that are read; None: all of it."""
        return self.longest

    @abstractmethod
    def is_enough(self, documents: Sequence[Tokens]) -> bool:
        """True if no more documents are needed."""

    @abstractmethod
    def windows(self, documents: Sequence[Tokens], context: int, start: Start) -> list[Window]:
        """The windows of one context length.

        Raises:
            DataError: the text is too short.
            ConfigError: the settings do not fit the context.
        """

    def check(self, model: MeasuredModel) -> None:  # noqa: B027  (most protocols work on any model)
        """Raise ConfigError if this model cannot be measured with it."""

    def buckets(self, context: int) -> list[tuple[int, int] | None]:
        """The range of positions [start, end) of each row of a context; None: all positions."""
        return [None]

    def measure(self, model: MeasuredModel, windows: Sequence[Window], advance: Advance) -> ProtocolResult:
        """Read the windows and return their losses."""
        return ProtocolResult(losses=[model.losses(w.ids, w.first, advance, w.length) for w in windows])

    @classmethod
    @abstractmethod
    def scored(cls, row: Row) -> str:
        """Which tokens the rows like `row` score, in a few words, for captions."""


def tokens_sha256(ids: Sequence[int]) -> str:
    """16 hex digits of the sha256 of the scored tokens. Losses may be paired if it is the same."""
    return hashlib.sha256(np.asarray(ids, dtype="<i8").tobytes()).hexdigest()[:16]


def too_short(documents: Sequence[Tokens], needed: int, count: int = 1) -> DataError:
    """The error for a text with fewer than `count` documents of `needed` tokens."""
    longest = max((len(d) for d in documents), default=0)
    have = sum(len(d) >= needed for d in documents)
    return DataError(
        f"the text is too short: {count} document(s) of {format_length(needed)} tokens needed, it has {have}, the "
        f"longest of {longest} tokens; give shorter lengths or a longer text"
    )
