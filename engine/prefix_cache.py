"""Caches that are reused from request to request."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from weakref import WeakSet

from transformers.cache_utils import Cache

from ..scaling.rope import Scaler
from ..tokenizer_tools.cover import shared_length
from .cache import cache_bytes, can_rewind, layers_agree, rewind, tokens_read
from .kv_cache import KVCache
from .prompt import Prompt
from .runners.runner import RopeState, Runner

SHARED = 32  # tokens of a common beginning from which on it is worth copying


class PrefixCache:
    """A cache that is reused, with the tokens that it holds.

    Before each use it is cropped to the tokens that the next text begins with, and its keys are rotated for the scaler
    in use. What cannot be cropped or rotated is dropped.

    Attributes:
        ids: the tokens in the cache.
        cache: None while it is empty.
        rope_state: the scaler that the keys are rotated for, and its length.
    """

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.cache: Cache | None = None
        self.rope_state: RopeState = Scaler(), None

    def shared(self, ids: list[int]) -> int:
        """How many tokens at the beginning of `ids` the cache holds."""
        return shared_length(self.ids, ids)

    def prepare_for(self, runner: Runner, certain_ids: list[int], length: int) -> Cache:
        """The cache under the scaler of `runner`, holding no more than the beginning that it shares with `certain_ids`.

        The last token is left out: it is run again to get its logits.

        Args:
            length: tokens that the cache will hold.
        """
        if self.rope_state != runner.rope_state:
            cache, ids = self.cache, self.ids
            self.clear()  # an interruption may leave some keys rotated and others not
            if cache is not None and runner.rotate_cached_keys(cache, self.rope_state):
                self.cache, self.ids = cache, ids
            self.rope_state = runner.rope_state
        self.truncate_to(self.ids[: self.shared(certain_ids[:-1])])
        if self.cache is None:
            self.cache = runner.new_cache(length)
        return self.cache

    def truncate_to(self, ids: list[int], interrupted: bool = False) -> None:
        """Crop the cache, in all layers alike, so that it holds a beginning of `ids`.

        Args:
            interrupted: a step was interrupted (Ctrl-C), possibly between two layers.
        """
        cache = self.cache
        self.clear()
        if cache is None:
            return
        if can_rewind(cache):
            lengths = [tokens_read(layer) for layer in cache.layers]
            held = min([len(ids), *lengths])
            if not (layers_agree(cache) and can_rewind(cache, max(lengths, default=0) - held)):
                return
            for layer, length in zip(cache.layers, lengths, strict=True):
                layer.crop(held - length)
        else:
            held = tokens_read(cache)
            if interrupted or held > len(ids):
                return
        self.cache, self.ids = cache, ids[:held]

    def hold(self, cache: Cache, ids: list[int], rope_state: RopeState) -> None:
        """Take over a cache and its tokens."""
        self.cache, self.ids, self.rope_state = cache, ids, rope_state

    def clear(self) -> None:
        """Free the memory."""
        self.cache, self.ids = None, []


class ContextCaches:
    """The caches of the last question's rows, reused for the next question."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cached: list[PrefixCache] = []
        self._borrowed: WeakSet[PrefixCache] = WeakSet()

    @contextlib.contextmanager
    def borrowed(self, rows: Sequence[Prompt]) -> Iterator[list[PrefixCache]]:
        """A cache for each row. After the block they are stored for the next question, in place of the earlier ones."""
        taken = self._take(rows)
        self._borrowed.update(taken)
        try:
            yield taken
        finally:
            if all(cached in self._borrowed for cached in taken):  # `clear` was not called meanwhile
                self._cached = taken

    def _take(self, rows: Sequence[Prompt]) -> list[PrefixCache]:
        """For each row the cache that holds most of its beginning, or an empty one. Unused caches are dropped."""
        with self._lock:
            free, self._cached = self._cached, []
        taken = []
        for row in rows:
            best = max(free, key=lambda cached: cached.shared(row.certain_ids), default=None)
            if best is None or not best.shared(row.certain_ids):
                best = PrefixCache()
            else:
                free = [cached for cached in free if cached is not best]
            taken.append(best)
        return taken

    def clear(self) -> None:
        """Free the caches. Those in use are not stored again."""
        self._cached, self._borrowed = [], WeakSet()


def shared_cache(cache: Cache | None, length: int) -> KVCache | None:
    """A fork of `cache` with its first `length` tokens; None if those are few, or the cache cannot be cropped."""
    if length < SHARED or not isinstance(cache, KVCache):
        return None
    excess = max(0, tokens_read(cache) - length)
    if not can_rewind(cache, excess):
        return None
    fork = cache.fork()
    rewind(fork, excess)
    return fork


class PrefixStore:
    """Caches of ended sequences, for later ones that begin alike under the same frequencies.

    They were computed from the same tokens, so they change an answer by rounding at most.

    Args:
        budget: bytes of all caches. The least recently used are freed.
    """

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._entries: list[_StoredCache] = []  # the most recently used is last

    @property
    def bytes(self) -> int:
        """Bytes of all caches."""
        return sum(entry.bytes for entry in self._entries)

    @property
    def caches(self) -> list[Cache]:
        """All caches."""
        return [entry.cache for entry in self._entries]

    def take(self, ids: list[int], rope_state: RopeState) -> Cache | None:
        """A cache with the longest stored beginning of `ids` without its last token; None if that is short.

        A cache that holds nothing else leaves the store. Another one stays, and is copied when it is written to.
        """
        usable = [entry for entry in self._entries if entry.rope_state == rope_state]
        best = max(usable, key=lambda entry: shared_length(entry.ids, ids[:-1]), default=None)
        if best is None:
            return None
        length = shared_length(best.ids, ids[:-1])
        cache = shared_cache(best.cache, length)
        if cache is not None:
            self._entries.remove(best)
            if length < len(best.ids):
                self._entries.append(best)
        return cache

    def give(self, ids: list[int], cache: Cache | None, rope_state: RopeState) -> None:
        """Add the cache of a sequence that has ended, whose tokens are `ids`."""
        if not isinstance(cache, KVCache) or not layers_agree(cache) or cache.layers[0].evicted:
            return
        ids = ids[: cache.length]
        if len(ids) < SHARED or cache.length > len(ids):
            return
        covered = [
            entry for entry in self._entries if entry.rope_state == rope_state and entry.ids == ids[: len(entry.ids)]
        ]
        self._entries = [entry for entry in self._entries if entry not in covered]
        self._entries.append(_StoredCache(ids=ids, cache=cache, rope_state=rope_state, bytes=cache_bytes(cache)))
        while self.bytes > self._budget:
            del self._entries[0]

    def clear(self) -> bool:
        """Free all caches. True if there were any."""
        was_filled, self._entries = bool(self._entries), []
        return was_filled


@dataclass(frozen=True, kw_only=True, eq=False)
class _StoredCache:
    ids: list[int]
    cache: KVCache
    rope_state: RopeState
    bytes: int
