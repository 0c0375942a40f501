"""Caches that are reused from request to request."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from weakref import WeakSet

from transformers.cache_utils import Cache

from ..scaling.rope import Scaler
from ..tokenizer_tools.cover import shared_length
from .cache import can_rewind, layers_agree, tokens_read
from .prompt import Prompt
from .runners.runner import RopeState, Runner


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
