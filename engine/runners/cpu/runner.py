"""The runner of the compiled kernels, for decoders on the CPU.

A decode step, which is a few tokens of any sequences, is one compiled function. A chunk of a prompt runs in torch.
Weights, keys and values stay in their own dtype, such as bfloat16 or int8. The arithmetic is float32, but on CPUs
that multiply bfloat16, both factors of a chunk's products are rounded to it (`precision`).

Shape suffixes: N tokens of a chunk, E hidden size, H query heads, K key-value heads, M keys, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path as Folder
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from ....errors import RopewalkWarning, UnsupportedModel, warn
from ....scaling.rope import Scaler
from ...attention.kernel import AttentionScore
from ...attention.rows import KeyRun
from ...cache import evict, rewind
from ...kv_cache import CacheShape, KVCache, check_room
from ...packed import PackedWeight
from ...patches.float32 import float32_arithmetic
from ...patches.probe import layer_ropes, logits, probe_ids
from ...rotary_site import RotarySite, primary_rotary
from ..runner import Path, RopeState
from ..transformers import TransformersRunner
from .bfloat16_attention import BFloat16Attention
from .chunk import ChunkAttention, DecoderLayers, cap_logits
from .family import decoder
from .kernels import HAS_BFLOAT16_PRODUCTS, UNAVAILABLE
from .rotation_table import RotationTable, rotate_cached_keys
from .skim import Sample, SkimAttention
from .tables import KINDS, StoredLinear, Tables, dtype_name, groups_of
from .threads import share_threads

Tree = tuple[int, list[list[int]]]
"""Length of the cache that a tree of tokens continues; for each token, the places of its ancestors and its own."""

MAX_STEP_TOKENS = 16  # above this, a chunk in torch is faster than the compiled step

_MAX_DIFFERENCE = {torch.float32: 1e-4, torch.bfloat16: 2e-3, torch.int8: 5e-3}
"""Of logits, by the dtype of keys and values: Euclidean norm, relative. Some of those round to the other side."""

_MAX_DIFFERENCE_OF_PRODUCTS = 0.1  # by products in bfloat16; in small random models of all families at most 0.04


class CompiledRunner(TransformersRunner):
    """Runs a decoder of one of the families in `family.py` on the CPU.

    Raises:
        UnsupportedModel: no family describes the model, or the kernels do not reproduce its logits.
    """

    is_compiled = True

    def __init__(
        self,
        hf: PreTrainedModel,
        sites: list[RotarySite],
        weights: str = "own",
        cache: str = "auto",
        folder: Folder | None = None,
        precision: str = "auto",
    ) -> None:
        super().__init__(hf)
        if UNAVAILABLE:
            raise UnsupportedModel(UNAVAILABLE)
        places = sorted({weight.device.type for weight in hf.parameters()} - {"cpu"})
        if "meta" in places:
            raise UnsupportedModel("compiled kernels need all weights in memory, and some are offloaded")
        if places or hf.dtype not in (torch.float32, torch.bfloat16):
            raise UnsupportedModel(
                f"compiled kernels run on the CPU in float32 or bfloat16, not {', '.join(places) or hf.dtype}"
            )
        self._decoder = decoder(hf)
        self._dtype, self._folder = hf.dtype, folder
        is_rounded = weights == "int8" or isinstance(self._decoder.head.weight, PackedWeight)
        if cache != "auto":
            self._dtype = getattr(torch, cache)
        elif is_rounded:
            self._dtype = torch.bfloat16
        if precision == "auto":
            narrow = HAS_BFLOAT16_PRODUCTS and (is_rounded or hf.dtype == torch.bfloat16)
            precision = "bfloat16" if narrow else "float32"
        self._products = getattr(torch, precision)
        self._primary = primary_rotary(sites)
        ropes, _ = layer_ropes(hf, sites)
        self._groups, self._group_of = groups_of(self._decoder, ropes)
        self._tables = Tables.of(self._decoder, self._groups, self._group_of)
        self._layers = DecoderLayers(self._decoder, self._tables)
        self._rotations: list[RotationTable] = []
        self.use(Scaler(), None)
        self._verify_chunk()  # before weights are rounded
        if weights == "int8":
            self._tables = Tables.of(self._decoder, self._groups, self._group_of, StoredLinear.rounded_to_int8)
            self._layers = DecoderLayers(self._decoder, self._tables)
        self._verify_step()

    @property
    def bytes_per_token(self) -> int:
        return self.cache_shape.bytes_per_token

    @property
    def precision(self) -> str:
        weights, cache, products = self.weights, dtype_name(self._dtype), dtype_name(self._products)
        if weights == cache == products == "float32":
            return weights
        return f"{weights}, {cache} cache, " + ("float32 arithmetic" if products == "float32" else "bfloat16 prefill")

    @property
    def how(self) -> str:
        """A short description of the runner."""
        import numba

        return (
            f"compiled steps (numba {numba.__version__}, {numba.get_num_threads()} threads), chunks in torch; weights "
            f"in {self.weights}, cache in {dtype_name(self._dtype)}, arithmetic in float32"
            + (", but products of chunks in bfloat16" if self._products == torch.bfloat16 else "")
        )

    @property
    def weights(self) -> str:
        return " + ".join(self._tables.formats)

    def use(self, scaler: Scaler, length: int | None) -> None:
        if self._rotations and (scaler, length) == self.rope_state:
            return
        self._rotations = []  # an interrupted call must not leave the old ones
        super().use(scaler, length)
        if any(group.window for group in self._groups):
            self._sink_window = None  # such layers see the keys just before a query, which may be evicted
        self._rotations = [RotationTable(group, self._primary, scaler, length) for group in self._groups]

    @property
    def cache_shape(self) -> CacheShape:
        """The shape and dtype of a cache for this runner."""
        d = self._decoder
        return CacheShape(
            layers=len(d.layers), heads=d.key_heads, dim=d.head_dim, dtype=self._dtype, folder=self._folder
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
        return logits[torch.tensor(counts).cumsum(0) - 1]

    def _verify_chunk(self) -> None:
        """Refuse a model whose logits after a chunk, which is not compiled, are not those of its own modules.

        Both in float32 arithmetic, with keys and values in float32.
        """
        ids = probe_ids(self.hf)[0].tolist()
        dtype, self._dtype = self._dtype, torch.float32
        with torch.inference_mode(), float32_arithmetic(self.hf):
            expected = logits(self.hf)[0]
            chunk = self._prefill_chunk(ids, self.new_cache(len(ids)), len(ids), torch.float32)
            self._check(chunk, expected)
        self._dtype = dtype

    def _verify_step(self) -> None:
        """Refuse a model whose logits after a compiled step, or a chunk in bfloat16, are not those of the exact chunk.

        With weights, keys and values in the dtypes that they will have: the step is compiled for no others.
        """
        ids = probe_ids(self.hf)[0].tolist()
        with torch.inference_mode():
            expected = self._prefill_chunk(ids, self.new_cache(len(ids)), len(ids), torch.float32)
            self._check(self._decode_step([(ids, self.new_cache(len(ids)))], len(ids)), expected)
            if self._products == torch.bfloat16:
                chunk = self._prefill_chunk(ids, self.new_cache(len(ids)), len(ids))
                self._check(chunk, expected, _MAX_DIFFERENCE_OF_PRODUCTS)

    def _check(self, computed: Tensor, expected: Tensor, limit: float | None = None) -> None:
        difference = float((computed - expected).norm() / expected.norm())
        if not difference < (limit or _MAX_DIFFERENCE[self._dtype]):
            raise UnsupportedModel(
                f"{type(self.hf).__name__} does not compute what its family's description says: its logits differ by "
                f"{difference:.2g} of their size"
            )

    def rotate_cached_keys(self, cache: Cache, before: RopeState) -> bool:
        if not isinstance(cache, KVCache) or cache.layers[0].evicted:
            return False
        earlier = [RotationTable(group, self._primary, *before) for group in self._groups]
        for group, layer in zip(self._group_of, cache.layers, strict=True):
            rotate_cached_keys(layer, earlier[group], self._rotations[group])
        return True

    def _evict(self, *caches: Cache) -> None:
        for cache in caches:
            if self.sink_window is not None:
                moved = partial(self._moved_keys, cache) if isinstance(cache, KVCache) else None
                evict(cache, self.sink_window, moved)

    def _moved_keys(self, cache: KVCache, index: int, first: int, count: int) -> Tensor:
        return self._rotations[self._group_of[index]].moved_keys(cache.layers[index], first, count)

    # decode steps

    def _decode_step(
        self, rows: Sequence[tuple[Sequence[int], KVCache]], logits_to_keep: int, tree: Tree | None = None
    ) -> Tensor:
        """Run a few tokens of any sequences by the compiled step.

        Returns:
            The logits after the last `logits_to_keep` tokens, [logits_to_keep, V].
        """
        threads = share_threads()
        from .kernels import step

        ids = [token for tokens, _ in rows for token in tokens]
        if min(ids) < 0 or max(ids) >= self.vocabulary_size:
            self.check(ids)  # raises
        x = self._decoder.embedding(torch.tensor(ids)).float().numpy()
        places = np.array([cache.length + k for tokens, cache in rows for k in range(len(tokens))], np.int64)
        buffers = self._buffer_addresses(rows)
        length, ancestors = tree or (0, None)
        positions = places
        if ancestors is not None:
            positions = np.array([length + len(path) - 1 for path in ancestors], np.int64)
        parts, firsts = self._key_parts(positions, length, ancestors)
        tables = self._tables
        logits = np.empty((logits_to_keep, self._decoder.head.weight.shape[0]), np.float32)
        arguments = (
            tables.shape,
            tables.numbers,
            tables.kind,
            KINDS[self._dtype],
            tables.linears,
            tables.norms,
            tables.groups,
            x,
            self._angles(positions),
            parts,
            firsts,
            np.stack([rotation.scales(positions, self._decoder.layers[0].scale) for rotation in self._rotations]),
            places,
            buffers,
            tables.head,
            logits,
        )
        if not step(*arguments, threads):
            warn(
                RopewalkWarning(
                    f"the {threads} threads of a step did not start together, so it runs on one; give this process as "
                    f"many cores as threads, or fewer threads by torch.set_num_threads"
                )
            )
            step(*arguments, 1)
        for tokens, cache in rows:
            cache.advance(len(tokens))
        softcap = self._decoder.softcap
        return torch.from_numpy(logits) if softcap is None else cap_logits(torch.from_numpy(logits), softcap)

    def _angles(self, positions: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], ...]:
        """Cosines and sines for the queries, [groups, bands, n, 2, half], and for the keys, [groups, n, 2, half].

        Groups with fewer bands are padded. The kernels do not read the padding.
        """
        tables = [rotation.angles(positions, self._tables.half) for rotation in self._rotations]
        bands = max(len(queries) for queries, _ in tables)
        padded = [np.resize(queries, (bands, *queries.shape[1:])) for queries, _ in tables]
        return np.stack(padded), np.stack([keys for _, keys in tables])

    def _key_parts(
        self, positions: np.ndarray[Any, Any], length: int, ancestors: list[list[int]] | None
    ) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """The keys that every token sees, cut into the parts that threads compute.

        Args:
            length, ancestors: of a `Tree`. Each ancestor is a part of one key.

        Returns:
            Parts, int64 [parts, 5], and the index of each token's first part, int64 [groups, n + 1], as `step` takes
            them.
        """
        from .kernels.attention import PART

        parts: list[tuple[int, int, int, int, int]] = []
        firsts: list[int] = []
        for rotation in self._rotations:
            shifts = [rotation.shifts(band, int(positions.max()) + 1) for band in range(len(rotation.bands))]
            for token, position in enumerate(positions.tolist()):
                firsts.append(len(parts))
                for band, start, count in rotation.visible(position):
                    stop, table = start + count, shifts[band]
                    address, row = (0, 0) if table is None else (table.ctypes.data, table.strides[0])
                    if ancestors is not None:
                        inside = range(max(start, length), max(stop, length))
                        parts += [
                            (token, band, ancestors[token][key - length], 1, address + key * row) for key in inside
                        ]
                        stop = min(stop, length)
                    parts += [
                        (token, band, key, min(PART, stop - key), address + key * row)
                        for key in range(start, stop, PART)
                    ]
            firsts.append(len(parts))
        return np.array(parts, np.int64), np.array(firsts, np.int64).reshape(len(self._rotations), -1)

    def _buffer_addresses(self, rows: Sequence[tuple[Sequence[int], KVCache]]) -> np.ndarray[Any, Any]:
        """The addresses of every token's keys and values, int64 [layers, n, 2, 3].

        On the last axis: the address of the numbers, the address of their scales (or 0), and the capacity in tokens.
        """
        addresses = np.empty((len(self._decoder.layers), sum(len(ids) for ids, _ in rows), 2, 3), np.int64)
        first = 0
        for ids, cache in rows:
            cache.reserve(len(ids))
            for index, layer in enumerate(cache.layers):
                key_scales, value_scales = layer.scales
                tokens = addresses[index, first : first + len(ids)]
                tokens[:, 0] = layer.keys.data_ptr(), key_scales, layer.capacity
                tokens[:, 1] = layer.values.data_ptr(), value_scales, layer.capacity
            first += len(ids)
        return addresses

    # chunks

    def _prefill_chunk(
        self, ids: Sequence[int], cache: KVCache, logits_to_keep: int, products: torch.dtype | None = None
    ) -> Tensor:
        """Run a chunk of one sequence in torch.

        Args:
            products: the dtype of the factors of matrix products; None is the runner's own.

        Returns:
            The logits after the last `logits_to_keep` tokens, [logits_to_keep, V].
        """
        self.check(ids)
        products = products or self._products
        start, count = cache.length, len(ids)
        run = KeyRun(None, 0, count, 0, start + count, 0)
        attention = BFloat16Attention if products == torch.bfloat16 else ChunkAttention
        chunks = [attention(rotation, run) for rotation in self._rotations]

        def attend(index: int, q: Tensor, k: Tensor, v: Tensor, score: AttentionScore) -> Tensor:
            return chunks[self._group_of[index]].attend(q, k, v, cache.layers[index], score)

        return self._layers.logits(self._layers.run(ids, attend, products)[-logits_to_keep:])

    @torch.inference_mode()
    def skim(self, ids: Sequence[int], sample: Sample, logits_to_keep: int) -> Tensor:
        """Run a sample of the tokens of a text.

        Args:
            ids: the tokens at `sample.positions`.

        Returns:
            The logits after the last `logits_to_keep` tokens, [logits_to_keep, V].
        """
        self.check(ids)
        chunks = [SkimAttention(rotation, sample) for rotation in self._rotations]

        def attend(index: int, q: Tensor, k: Tensor, v: Tensor, score: AttentionScore) -> Tensor:
            return chunks[self._group_of[index]].attend(q, k, v, score)

        return self._layers.logits(self._layers.run(ids, attend, self._products)[-logits_to_keep:])
