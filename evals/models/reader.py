"""A model as the protocols see it: token ids in, losses or logits out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import ConfigError, UnsupportedModel
from ...scaling.rope import Scaler
from ...tokenizer_tools.encode import start_ids
from ...tokenizer_tools.vocabulary import check_ids
from ..runs.cell import Advance
from ..runs.result import Losses
from ..speed.memory import peak_memory_mb

if TYPE_CHECKING:
    from torch import Tensor
    from transformers.cache_utils import Cache

    from ...engine.model import Model
    from ...engine.runners.runner import Runner
    from ...tokenizer_tools.vocabulary import Vocabulary

Tokens = list[int]

Logits = Callable[[Tokens], Any]
"""Token ids [n] in, logits [n, V] out, as a torch tensor or a numpy array."""

_ROWS = 256  # of a foreign engine's logits turned into losses at once


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a tokenizer puts before a text.

    Args:
        prefix: the tokens that it does put there.
        token: the one that can stand there: the start token, or where there is none the end token.
    """

    prefix: Tokens
    token: int | None

    @classmethod
    def of(cls, tokenizer: Any) -> Start:
        """Of a transformers tokenizer."""
        token = tokenizer.bos_token_id
        return cls(
            prefix=start_ids(tokenizer),
            token=tokenizer.eos_token_id if token is None else token,
        )


class Reader(ABC):
    """A model under one scaler.

    Attributes:
        name: of the model.
        precision: in which numbers it computes.
        device: where.
        trained_length: tokens that it was trained to read; None where nobody said.
        marks: further fields in the recipes of its rows, JSON scalars.
        cache: of the text that it read last, to go on from; None where that is not at hand.
    """

    name: str
    precision: str
    device: str
    trained_length: int | None
    metadata: Mapping[str, Any] = MappingProxyType({})
    cache: Cache | None = None

    @property
    def memory_mb(self) -> float | None:
        """Most memory that it has held so far, MB; None where that is not known."""
        return peak_memory_mb()

    def check(self, length: int) -> None:  # noqa: B027  (most read any length)
        """Raise ContextOverflow if `length` tokens are more than it can read."""

    @abstractmethod
    def losses(self, ids: Tokens, first: int, advance: Advance) -> Losses:
        """Nats of `ids[first:]`, each given all before it, float32 [len(ids) - first]."""

    @abstractmethod
    def logits(self, ids: Tokens, first: int, advance: Advance) -> Iterator[Tensor]:
        """The logits that predict `ids[first:]`, float32 [tokens, V], some tokens at a time."""

    @abstractmethod
    def under(self, scaler: Scaler) -> Reader:
        """The same model under another scaler; both can be read in turn.

        Raises:
            ConfigError: it can only be read as it is.
        """

    def rope_at(self, length: int) -> Scaler:
        """The scaler for `length` tokens: the one that it is under, or what `auto` stands for there."""
        return Scaler()

    @abstractmethod
    def count_bytes(self, ids: Sequence[int]) -> int | None:
        """Bytes of the text that tokens stand for; None where the tokenizer is not known."""


def bytes_of(ids: Sequence[int], tokenizer: Any, vocabulary: Callable[[], Vocabulary]) -> int:
    """Bytes of the text that tokens stand for, by the tokens' own bytes where the tokenizer's are known."""
    try:
        return len(vocabulary().text_bytes(list(ids)))
    except (UnsupportedModel, IndexError):  # no bytes of its own, or ids that only pad the matrix
        return len(tokenizer.decode(list(ids)).encode())


def weight_metadata(model: Model) -> dict[str, str]:
    """What tells a model from another one at the same path, for recipes."""
    return {"weights": model.fingerprint[:16]}


class ModelReader(Reader):
    """A ropewalk model."""

    def __init__(self, model: Model, scaler: Scaler | None = None) -> None:
        from ...engine.placement import input_device

        self._model = model
        self._scaler = model.rope if scaler is None else scaler
        self.name, self.precision = model.name, model.precision
        self.device, self.trained_length = input_device(model.hf).type, model.trained_length
        self.metadata = weight_metadata(model)

    def losses(self, ids: Tokens, first: int, advance: Advance) -> Losses:
        with self._running(len(ids)):  # the scaler must not change before it has scored
            self.cache = self._model.new_cache(len(ids))
            losses: Losses = -self._model.score_ids(ids, first, advance, self.cache).numpy()
        return losses

    def logits(self, ids: Tokens, first: int, advance: Advance) -> Iterator[Tensor]:
        from ...engine.prompt import token_ids
        from ...engine.score import scored_logits

        ids = token_ids(ids, self._model.vocabulary_size)
        with self._running(len(ids)) as runner:
            self.cache = self._model.new_cache(len(ids))
            pieces = scored_logits(runner, ids, first, self.cache, advance)
        while True:
            with self._running(len(ids)):  # another reader may have had the model since the last piece
                piece = next(pieces, None)
            if piece is None:
                return
            yield piece

    def under(self, scaler: Scaler) -> ModelReader:
        return ModelReader(self._model, scaler)

    def rope_at(self, length: int) -> Scaler:
        with self._running(length):
            return self._model.rope_at(length)

    def count_bytes(self, ids: Sequence[int]) -> int:
        return bytes_of(ids, self._model.tokenizer, lambda: self._model.vocabulary)

    def _running(self, length: int) -> AbstractContextManager[Runner]:
        return self._model.running_under(self._scaler, length)


class CallableReader(Reader):
    """Any function from token ids to logits: another engine, or one that a test made up."""

    precision, device = "unknown", "unknown"

    def __init__(
        self, function: Logits, *, name: str, tokenizer: Any = None, trained_length: int | None = None
    ) -> None:
        self._function, self._tokenizer = function, tokenizer
        self.name, self.trained_length = name, trained_length

    def losses(self, ids: Tokens, first: int, advance: Advance) -> Losses:
        import torch

        rows, targets = self._read(ids, first, advance), torch.tensor(ids[first:])
        parts = []
        for start in range(0, len(targets), _ROWS):
            logits = torch.as_tensor(rows[start : start + _ROWS]).detach().cpu().float()
            chosen = logits.gather(-1, targets[start : start + _ROWS, None])[:, 0]
            parts.append((logits.logsumexp(-1) - chosen).numpy())
        return np.concatenate(parts)

    def logits(self, ids: Tokens, first: int, advance: Advance) -> Iterator[Tensor]:
        raise ConfigError(f"{self.name}: its logits cannot be held against another scaler's; load it with ropewalk")

    def under(self, scaler: Scaler) -> Reader:
        if scaler.parts:
            raise ConfigError(
                f"{self.name} is a function from tokens to logits, whose positions cannot be scaled by {scaler}; "
                "give a ropewalk or transformers model"
            )
        return self

    def count_bytes(self, ids: Sequence[int]) -> int | None:
        return None if self._tokenizer is None else len(self._tokenizer.decode(list(ids)).encode())

    def _read(self, ids: Tokens, first: int, advance: Advance) -> Any:
        """What the function gives for all tokens but the last, from the row that predicts `ids[first]` on."""
        rows = self._function(ids[:-1])
        shape = tuple(rows.shape)
        if len(shape) != 2 or shape[0] != len(ids) - 1:
            raise ConfigError(
                f"{self.name} gave logits of shape {list(shape)} for {len(ids) - 1} tokens; [{len(ids) - 1}, V] needed"
            )
        check_ids(ids[first:], shape[1])
        advance(0, len(ids) - 1)
        return rows[first - 1 :]
