"""The interface of all runners: they run token ids on top of a cache and return logits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from ...scaling.positions import PositionScaler
from ...scaling.rope import Scaler
from ...tokenizer_tools.vocabulary import check_ids
from ..cache import evict, most_held

Path = tuple[int, ...]

RopeState = tuple[Scaler, int | None]

CHUNK = 1024  # tokens of a prefill step; 8k tokens of a 135M model take 41, 39, 38, 38 s at 256, 512, 1024, 2048


def token_rows(hf: PreTrainedModel) -> int:
    """The number of tokens that a model can both read and write."""
    outputs = int(hf.config.get_text_config().vocab_size)
    embedding = getattr(hf, "get_input_embeddings", lambda: None)()
    return min(outputs, getattr(embedding, "num_embeddings", outputs))


class Runner(ABC):
    """Runs a model under one scaler at a time.

    Attributes:
        hf: the transformers model. If its modules run, the scaler is patched into it.
        is_compiled: True if compiled kernels run the model.
        vocabulary_size: the number of tokens that the model can both read and write. Logits may have more columns,
            for tokens that it cannot read; such a token must not be drawn.
        chunk_factor: how many times the tokens of a CPU's prefill step it reads at a time.
        rope_state: the scaler in use, and its length if it depends on the length. `use` sets it.
    """

    is_compiled: ClassVar[bool] = False
    chunk_factor: int = 1

    def __init__(self, hf: PreTrainedModel) -> None:
        self.hf = hf
        self.vocabulary_size = token_rows(hf)
        self.rope_state: RopeState = Scaler(), None
        self._sink_window: tuple[int, int] | None = None

    def use(self, scaler: Scaler, length: int | None) -> None:
        """Run under `scaler` from now on. The model is already patched with it.

        Args:
            length: the length of the sequences, if the frequencies depend on it; else None.
        """
        self.rope_state = scaler, length
        self._sink_window = _sink_window(scaler, length)

    @property
    def chunk(self) -> int:
        """The most tokens of a prefill step."""
        return CHUNK * self.chunk_factor

    @property
    def sink_window(self) -> tuple[int, int] | None:
        """The number of first keys and of last keys that later tokens see; None if a cache keeps every key."""
        return self._sink_window

    @property
    @abstractmethod
    def bytes_per_token(self) -> int:
        """Bytes of the keys and values of one token."""

    @property
    @abstractmethod
    def weights(self) -> str:
        """The dtype of the stored weights."""

    @property
    @abstractmethod
    def precision(self) -> str:
        """The dtypes of weights, cache and arithmetic, as a label for results."""

    @property
    @abstractmethod
    def how(self) -> str:
        """A short description of the runner."""

    def check(self, ids: Sequence[int]) -> None:
        """Raise DataError if the model has no token with one of these ids."""
        check_ids(ids, self.vocabulary_size)

    @abstractmethod
    def check_room(self, *rows: int, owned: int = 0, reserved: int = 0) -> None:
        """Raise ContextOverflow if memory is known to be too small for caches of these lengths.

        Args:
            rows: the tokens of each cache.
            owned: how many of all these tokens have allocated memory already.
            reserved: bytes that other caches will take; below 0 if they will free memory.
        """

    @abstractmethod
    def needed_bytes(self, *rows: int, owned: int = 0) -> int:
        """Bytes that caches of these lengths will take beside what they have; 0 if that is not known.

        Args:
            rows, owned: as for `check_room`.
        """

    @abstractmethod
    def new_cache(self, capacity: int) -> Cache:
        """An empty cache for one sequence of about `capacity` tokens."""

    def rotate_cached_keys(self, cache: Cache, before: RopeState) -> bool:
        """Rotate the keys of a cache from `before` to the state in use, in place.

        Returns:
            False if that is not possible, so that the text must be read again.
        """
        return False

    @abstractmethod
    def forward(self, ids: Sequence[int], cache: Cache, logits_to_keep: int) -> Tensor:
        """Run `ids` on top of `cache` and return the logits after the last tokens, [logits_to_keep, V].

        Raises:
            DataError: the model has no such token.
        """

    def step(self, rows: Sequence[tuple[Sequence[int], Cache]]) -> Tensor:
        """Run a few tokens of several sequences, each on top of its own cache.

        Returns:
            The logits after each sequence, [rows, V]. The logits of a row do not depend on the other rows.
        """
        return torch.cat([self.forward(ids, cache, logits_to_keep=1) for ids, cache in rows])

    @property
    @abstractmethod
    def runs_trees(self) -> bool:
        """True if `tree` can be called."""

    @abstractmethod
    def tree(self, paths: Sequence[Path], cache: Cache) -> Tensor:
        """Run several continuations of the cache in one forward pass. The cache does not change.

        Args:
            paths: token sequences. Every prefix of a path is a path too, and comes before it.

        Returns:
            The logits after each path, [paths, V].
        """

    def _room(self, tokens: int) -> int:
        """The most keys that a cache stores while it reads `tokens` tokens."""
        return tokens if self.sink_window is None else min(tokens, most_held(self.sink_window) + self.chunk)

    def _evict(self, *caches: Cache) -> None:
        """Drop the keys that no later token sees."""
        if self.sink_window is not None:
            for cache in caches:
                evict(cache, self.sink_window)


def _sink_window(scaler: Scaler, length: int | None) -> tuple[int, int] | None:
    """The sinks and the window of a position map, if it sees no other keys.

    A temperature, and a scaler that depends on the length, need true positions. Under them a cache keeps every key.
    """
    position_map = scaler.member("positions")
    if length is not None or scaler.depends_on_length or scaler.member("temperature") is not None:
        return None
    return position_map.sink_window if isinstance(position_map, PositionScaler) else None
