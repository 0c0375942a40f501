"""What the runners of our own engines share: a decoder of `family.py`, its rotations, and caches of our own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from pathlib import Path as Folder

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from ...errors import UnsupportedModel
from ...scaling.rope import Scaler
from ..attention.kernel import AttentionScore
from ..cache import evict, rewind
from ..kv_cache import CacheShape, KVCache, check_room
from ..patches.probe import layer_ropes
from ..rotary_site import RotarySite, primary_rotary
from .chunk_attention import Attend
from .family import Decoder
from .rotation_table import RotationTable, groups_of, rotate_cached_keys
from .runner import Path, RopeState
from .skim import Sample, SkimAttention
from .transformers import TransformersRunner

Tree = tuple[int, list[list[int]]]
"""Length of the cache that a tree of tokens continues; for each token, the places of its ancestors and its own."""

Rows = Sequence[tuple[Sequence[int], KVCache]]
"""Sequences: the tokens that each runs, and its cache."""

MAX_STEP_TOKENS = 16  # above this, a chunk of one sequence is faster than the step of single tokens


class DecoderRunner(TransformersRunner):
    """Runs a described decoder by an engine of our own: a step of a few tokens of any sequences, or a chunk of one.

    Args:
        decoder: its weights.
        cache: the dtype of keys and values.
        folder: for memory-mapped files with keys and values; None holds them in memory.
    """

    is_compiled = True

    def __init__(
        self,
        hf: PreTrainedModel,
        sites: list[RotarySite],
        decoder: Decoder,
        cache: torch.dtype,
        folder: Folder | None = None,
    ) -> None:
        super().__init__(hf)
        self._decoder, self._dtype, self._folder = decoder, cache, folder
        self._primary = primary_rotary(sites)
        ropes, _ = layer_ropes(hf, sites)
        self._groups, self._group_of_layer = groups_of(decoder, ropes)
        self._rotations: list[RotationTable] = []
        self._rotation_of: list[int] = []

    def use(self, scaler: Scaler, length: int | None) -> None:
        if self._rotations and (scaler, length) == self.rope_state:
            return
        self._rotations = []  # an interrupted call must not leave the old ones
        super().use(scaler, length)
        if any(group.window for group in self._groups):
            self._sink_window = None  # such layers see the keys just before a query, which may be evicted
        self._rotations, self._rotation_of = self._rotations_under(scaler, length)

    def _rotations_under(self, scaler: Scaler, length: int | None) -> tuple[list[RotationTable], list[int]]:
        """A table for every group of layers that also have the same scaler, and the index of every layer's table."""
        keys = [(group, scaler.on(layer)) for layer, group in enumerate(self._group_of_layer)]
        places = {key: place for place, key in enumerate(dict.fromkeys(keys))}
        tables = [RotationTable(self._groups[group], self._primary, each, length) for group, each in places]
        return tables, [places[key] for key in keys]

    @property
    def bytes_per_token(self) -> int:
        return self.cache_shape.bytes_per_token

    @property
    def cache_shape(self) -> CacheShape:
        """The shape, dtype and device of a cache for this runner."""
        d = self._decoder
        return CacheShape(
            layers=len(d.layers),
            heads=d.key_heads,
            dim=d.head_dim,
            dtype=self._dtype,
            device=d.final_norm.device,
            folder=self._folder,
        )

    def check_room(self, *rows: int, owned: int = 0, reserved: int = 0) -> None:
        check_room(self.cache_shape, self._missing(rows, owned), reserved)

    def needed_bytes(self, *rows: int, owned: int = 0) -> int:
        return self.cache_shape.bytes_per_token * self._missing(rows, owned)

    def _missing(self, rows: Sequence[int], owned: int) -> int:
        """Tokens of caches of these lengths that have no memory yet."""
        return max(0, sum(map(self._room, rows)) - owned)

    def new_cache(self, capacity: int) -> KVCache:
        return KVCache(self.cache_shape, self._room(capacity))

    @torch.no_grad()
    def forward(self, ids: Sequence[int], cache: Cache, logits_to_keep: int) -> Tensor:
        if not isinstance(cache, KVCache):
            return super().forward(ids, cache, logits_to_keep)
        if len(ids) <= MAX_STEP_TOKENS:
            logits = self._decode_step([(ids, cache)], logits_to_keep)
        else:
            logits = self._prefill_chunk(ids, cache, logits_to_keep)
        if self._sink_window is not None:
            self._evict(cache)
        return logits

    @property
    def runs_trees(self) -> bool:
        return True

    @torch.no_grad()
    def tree(self, paths: Sequence[Path], cache: Cache) -> Tensor:
        if not isinstance(cache, KVCache):
            return super().tree(paths, cache)
        length = cache.length
        place = {path: length + n for n, path in enumerate(paths)}
        ancestors = [[place[path[: k + 1]] for k in range(len(path))] for path in paths]
        logits = self._decode_step([([path[-1] for path in paths], cache)], len(paths), (length, ancestors))
        rewind(cache, len(paths))
        return logits

    @torch.no_grad()
    def step(self, rows: Sequence[tuple[Sequence[int], Cache]]) -> Tensor:
        if not all(isinstance(cache, KVCache) for _, cache in rows):
            return super().step(rows)
        counts = [len(ids) for ids, _ in rows]
        logits = self._decode_step(rows, sum(counts))
        if self._sink_window is not None:
            self._evict(*(cache for _, cache in rows))
        return logits if len(logits) == len(rows) else logits[torch.tensor(counts).cumsum(0) - 1]

    @torch.inference_mode()
    def skim(self, ids: Sequence[int], sample: Sample, logits_to_keep: int) -> Tensor:
        """Run a sample of the tokens of a text.

        Args:
            ids: the tokens at `sample.positions`.

        Returns:
            The logits after the last `logits_to_keep` tokens, [logits_to_keep, V].
        """
        self.check(ids)
        chunks = [SkimAttention(rotation, sample, self.cache_shape.device) for rotation in self._rotations]

        def attend(index: int, q: Tensor, k: Tensor, v: Tensor, score: AttentionScore) -> Tensor:
            return chunks[self._rotation_of[index]].attend(q, k, v, score)

        return self._run_chunk(ids, attend, logits_to_keep)

    @abstractmethod
    def _decode_step(self, rows: Rows, logits_to_keep: int, tree: Tree | None = None) -> Tensor:
        """Run a few tokens of any sequences, and count them in the caches.

        Returns:
            The logits after the last `logits_to_keep` tokens, float32 [logits_to_keep, V].
        """

    @abstractmethod
    def _prefill_chunk(
        self, ids: Sequence[int], cache: KVCache, logits_to_keep: int, products: torch.dtype | None = None
    ) -> Tensor:
        """Run a chunk of one sequence.

        Args:
            products: the dtype of the factors of matrix products; None is the runner's own.

        Returns:
            The logits after the last `logits_to_keep` tokens, float32 [logits_to_keep, V].
        """

    @abstractmethod
    def _run_chunk(
        self, ids: Sequence[int], attend: Attend, logits_to_keep: int, products: torch.dtype | None = None
    ) -> Tensor:
        """Run the layers of a chunk, with `attend` as the attention; the rest as for `_prefill_chunk`."""

    def _check(self, computed: Tensor, expected: Tensor, limit: float) -> None:
        """Refuse the model if logits differ by `limit` or more of their Euclidean norm."""
        difference = float((computed - expected).norm() / expected.norm())
        if not difference < limit:
            raise UnsupportedModel(
                f"{type(self.hf).__name__} does not compute what its family's description says: its logits differ by "
                f"{difference:.2g} of their size"
            )

    def rotate_cached_keys(self, cache: Cache, before: RopeState) -> bool:
        if not isinstance(cache, KVCache) or cache.layers[0].evicted:
            return False
        earlier, earlier_of = self._rotations_under(*before)
        for layer, old, new in zip(cache.layers, earlier_of, self._rotation_of, strict=True):
            rotate_cached_keys(layer, earlier[old], self._rotations[new])
        return True

    def _evict(self, *caches: Cache) -> None:
        for cache in caches:
            if self.sink_window is not None:
                moved = partial(self._moved_keys, cache) if isinstance(cache, KVCache) else None
                evict(cache, self.sink_window, moved)

    def _moved_keys(self, cache: KVCache, index: int, first: int, count: int) -> Tensor:
        return self._rotations[self._rotation_of[index]].moved_keys(cache.layers[index], first, count)
