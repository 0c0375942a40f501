"""A network of our own on the CPU: a step of decoding in one compiled function, a chunk of a prompt in torch.

Arithmetic is float32 throughout. Weights stay as the model holds them, in bfloat16 or int8 too, and are widened as
they are read; so do keys and values.

Shape suffixes: N tokens of a chunk, E hidden size, H query heads, K key-value heads, M keys, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path as Folder
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from ...errors import ConfigError, UnsupportedModel
from ...scaling.rope import Scaler
from ..bands.kernel import Score
from ..bands.rotation import angles
from ..bands.rows import Run
from ..cache import rewind
from ..kv_cache import CacheShape, KVCache, KVLayer
from ..memory import check_room
from ..network import Network, Path, Setting
from ..patches.float32 import float32_arithmetic
from ..patches.probe import layer_ropes, logits, probe_ids
from ..patches.rotary import RotarySite, headline
from .chunk import Chunk
from .family import decoder
from .kernels import UNAVAILABLE
from .layers import Layers
from .skim import Sample, SkimmedChunk
from .tables import KINDS, Stored, Tables, dtype_name, groups_of
from .threads import share_threads
from .turns import Turns, retune

Tree = tuple[int, list[list[int]]]

FEW = 16  # tokens up to which the compiled step is faster than a chunk in torch

_VERIFIED = 1e-4  # difference of the logits from float32 arithmetic, of their size, in the Euclidean norm


class CompiledNetwork(Network):
    """A decoder that `family` describes, on the CPU.

    Raises:
        UnsupportedModel: it is not described, or not reproduced; the message says why.
    """

    is_compiled = True

    def __init__(
        self,
        hf: PreTrainedModel,
        sites: list[RotarySite],
        weights: str = "own",
        cache: str = "auto",
        folder: Folder | None = None,
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
        self._dtype, self._folder = torch.float32, None
        self._headline = headline(sites)
        ropes, _ = layer_ropes(hf, sites)
        self._groups, self._group_of = groups_of(self._decoder, ropes)
        self._tables = Tables.of(self._decoder, self._groups, self._group_of)
        self._layers = Layers(self._decoder, self._tables)
        self._turns: list[Turns] = []
        self.use(Scaler(), None)
        self._verify()  # before anything is rounded, keys and values neither
        self._dtype = hf.dtype
        if weights == "int8":
            self._tables = Tables.of(self._decoder, self._groups, self._group_of, Stored.in_int8)
            self._layers = Layers(self._decoder, self._tables)
        if cache != "auto":
            self._dtype = getattr(torch, cache)
        elif weights == "int8":
            self._dtype = torch.bfloat16
        self._folder = folder

    @property
    def bytes_per_token(self) -> int:
        return self.cache_shape.bytes_per_token

    @property
    def precision(self) -> str:
        weights, cache = dtype_name(self._tables.stored_head.weight.dtype), dtype_name(self._dtype)
        if weights == cache == "float32":
            return weights
        return f"{weights}, {cache} cache, float32 arithmetic"

    @property
    def how(self) -> str:
        """What runs the model."""
        import numba

        return (
            f"compiled steps (numba {numba.__version__}, {numba.get_num_threads()} threads), chunks in torch; weights "
            f"in {self.weights}, cache in {dtype_name(self._dtype)}, arithmetic in float32"
        )

    @property
    def weights(self) -> str:
        return dtype_name(self._tables.stored_head.weight.dtype)

    def use(self, scaler: Scaler, length: int | None) -> None:
        before = self._setting
        if self._dtype == torch.int8 and scaler.member("positions"):
            raise ConfigError(f"{scaler} holds its keys in several forms, an int8 cache in one; leave out kv_dtype")
        super().use(scaler, length)
        if before != self._setting or not self._turns:
            self._turns = [Turns(group, self._headline, *self._setting) for group in self._groups]

    @property
    def cache_shape(self) -> CacheShape:
        """What a cache of this network looks like."""
        d = self._decoder
        return CacheShape(
            layers=len(d.layers), heads=d.key_heads, dim=d.head_dim, dtype=self._dtype, folder=self._folder
        )

    def check_room(self, *rows: int, owned: int = 0) -> None:
        needed = max(0, sum(map(self._room, rows)) - owned)
        check_room(self.cache_shape, needed, 1 + max(len(turns.key_bands) for turns in self._turns))

    def new_cache(self, capacity: int) -> KVCache:
        return KVCache(self.cache_shape, self._room(capacity))

    @property
    def kept(self) -> tuple[int, int] | None:
        return None if any(group.window for group in self._groups) else super().kept  # windows hold turned keys

    @torch.no_grad()
    def forward(self, ids: Sequence[int], cache: Cache, keep: int) -> Tensor:
        if not isinstance(cache, KVCache):
            return super().forward(ids, cache, keep)
        found = self._few([(ids, cache)], keep) if len(ids) <= FEW else self._many(ids, cache, keep)
        self._forget(cache)
        return found

    @property
    def runs_trees(self) -> bool:
        return True

    @torch.no_grad()
    def tree(self, paths: Sequence[Path], cache: Cache) -> Tensor:
        if not isinstance(cache, KVCache):
            return super().tree(paths, cache)
        held = cache.length
        place = {path: held + n for n, path in enumerate(paths)}
        ancestors = [[place[path[: k + 1]] for k in range(len(path))] for path in paths]
        found = self._few([([path[-1] for path in paths], cache)], len(paths), (held, ancestors))
        rewind(cache, len(paths))
        return found

    @torch.no_grad()
    def step(self, rows: Sequence[tuple[Sequence[int], Cache]]) -> Tensor:
        if not all(isinstance(cache, KVCache) for _, cache in rows):
            return super().step(rows)
        counts = [len(ids) for ids, _ in rows]
        found = self._few(rows, sum(counts))
        self._forget(*(cache for _, cache in rows))
        return found[torch.tensor(counts).cumsum(0) - 1]

    def _verify(self) -> None:
        """Refuse unless both ways of running give the logits of the model's own modules in float32 arithmetic."""
        with torch.inference_mode(), float32_arithmetic(self.hf):
            expected = logits(self.hf)[0]
            ids: list[int] = probe_ids(self.hf)[0].tolist()
            caches = self.new_cache(len(ids)), self.new_cache(len(ids))
            for found in (self._few([(ids, caches[0])], len(ids)), self._many(ids, caches[1], len(ids))):
                difference = float((found - expected).norm() / expected.norm())
                if not difference < _VERIFIED:
                    raise UnsupportedModel(
                        f"{type(self.hf).__name__} computes something else than its family's description says (its "
                        f"logits differ by {difference:.2g} of their size)"
                    )

    def retune(self, cache: Cache, before: Setting) -> bool:
        if not isinstance(cache, KVCache) or cache.layers[0].forgotten:
            return False
        used = dict(zip(self._groups, self._turns, strict=True))
        for index, layer in enumerate(cache.layers):
            group = self._groups[self._group_of[index]]
            retune(layer, Turns(group, self._headline, *before), used[group])
        return True

    # A few tokens

    def _few(self, rows: Sequence[tuple[Sequence[int], KVCache]], keep: int, tree: Tree | None = None) -> Tensor:
        """Tokens of any sequences, by the compiled step: the logits of the last `keep`, [keep, V].

        Args:
            tree: tokens held before a tree, and for each of its tokens the places of those that it follows, and its
                own.
        """
        threads = share_threads()
        from .kernels import step  # compiles, or reads what an earlier process compiled

        ids = [token for own, _ in rows for token in own]
        self.check(ids)
        x = self._decoder.embedding(torch.tensor(ids)).float().numpy()
        places = np.array([cache.length + k for own, cache in rows for k in range(len(own))], np.int64)
        buffers = self._buffers(rows)
        held, ancestors = tree or (0, None)
        at = places if ancestors is None else np.array([held + len(own) - 1 for own in ancestors], np.int64)
        parts, firsts = self._parts(at, held, ancestors)
        tables = self._tables
        found = np.empty((keep, self._decoder.head.weight.shape[0]), np.float32)
        step(
            tables.shape,
            tables.numbers,
            tables.kind,
            KINDS[self._dtype],
            tables.linears,
            tables.norms,
            tables.groups,
            x,
            (self._turned("queries", at), self._turned("keys", at)),
            parts,
            firsts,
            np.stack([turns.scales(at, self._decoder.layers[0].scale) for turns in self._turns]),
            places,
            buffers,
            tables.head,
            found,
            threads,
        )
        for own, cache in rows:
            cache.advance(len(own))
        return self._layers.capped(torch.from_numpy(found))

    def _turned(self, which: str, positions: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Angles of all groups, [groups, forms, n, 2, half]; forms that a group lacks are filled up and not used."""
        found = [getattr(turns, which)(positions, self._tables.half) for turns in self._turns]
        forms = max(map(len, found))
        return np.stack([np.resize(one, (forms, *one.shape[1:])) for one in found])

    def _parts(
        self, positions: np.ndarray[Any, Any], held: int, ancestors: list[list[int]] | None
    ) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Which keys every token sees, in the parts that threads compute; those of a tree are one by one."""
        from .kernels.attention import PART

        parts: list[tuple[int, int, int, int, int]] = []
        firsts: list[int] = []
        for turns in self._turns:
            for token, position in enumerate(positions.tolist()):
                firsts.append(len(parts))
                for band, form, start, count in turns.sees(position):
                    stop = start + count
                    if ancestors is not None:
                        own = ancestors[token][max(0, start - held) : max(0, stop - held)]
                        parts += [(token, band, form, place, 1) for place in own]
                        stop = min(stop, held)
                    parts += [(token, band, form, at, min(PART, stop - at)) for at in range(start, stop, PART)]
            firsts.append(len(parts))
        return np.array(parts, np.int64), np.array(firsts, np.int64).reshape(len(self._turns), -1)

    def _buffers(self, rows: Sequence[tuple[Sequence[int], KVCache]]) -> np.ndarray[Any, Any]:
        """Where every token's keys and values lie, [layers, n, forms + 1, 3]."""
        layers = len(self._decoder.layers)
        forms = 1 + max(len(turns.key_bands) for turns in self._turns)
        found = np.zeros((layers, sum(len(own) for own, _ in rows), forms + 1, 3), np.int64)
        at = 0
        for own, cache in rows:
            cache.reserve(len(own))
            for index, layer in enumerate(cache.layers):
                turns = self._turns[self._group_of[index]]
                key_scales, value_scales = layer.scales
                held = [(layer.keys, key_scales), *((c, 0) for c in self._copies(layer, turns, len(own)))]
                for form, (keys, scales) in enumerate(held):
                    found[index, at : at + len(own), form] = keys.data_ptr(), scales, keys.shape[2]
                found[index, at : at + len(own), forms] = layer.values.data_ptr(), value_scales, layer.capacity
            at += len(own)
        return found

    def _copies(self, layer: KVLayer, turns: Turns, count: int) -> list[Tensor]:
        """The turned copies of a layer's keys, with room for `count` more."""
        keys = layer.keys[:, :, : layer.length]

        def turner(band: int) -> Callable[[int, int], Tensor]:
            def turn(start: int, stop: int) -> Tensor:
                assert turns.group.layout is not None
                where = turns.plan.site.bands(*turns.setting[:2])[band].key(torch.arange(start, stop))
                found = angles(where, turns.frequencies.inv_freq, like=keys)
                return turns.group.layout.rotate(keys[:, :, start:stop], found)

            return turn

        return [layer.turned.room(turns.setting, band, keys, turner(band), count) for band in turns.key_bands]

    # A chunk

    def _many(self, ids: Sequence[int], cache: KVCache, keep: int) -> Tensor:
        """A chunk of one sequence, in torch: the logits of the last `keep` tokens, [keep, V]."""
        self.check(ids)
        start, count = cache.length, len(ids)
        run = Run(None, 0, count, 0, start + count, 0)
        chunks = [Chunk(turns, run) for turns in self._turns]

        def attend(index: int, q: Tensor, k: Tensor, v: Tensor, score: Score) -> Tensor:
            return chunks[self._group_of[index]].attend(q, k, v, cache.layers[index], score)

        return self._layers.logits(self._layers.run(ids, attend)[-keep:])

    @torch.inference_mode()
    def skim(self, ids: Sequence[int], sample: Sample, keep: int) -> Tensor:
        """Read only the tokens of a sample of a text, `ids`: the logits of the last `keep`, [keep, V]."""
        self.check(ids)
        chunks = [SkimmedChunk(turns, sample) for turns in self._turns]

        def attend(index: int, q: Tensor, k: Tensor, v: Tensor, score: Score) -> Tensor:
            return chunks[self._group_of[index]].attend(q, k, v, score)

        return self._layers.logits(self._layers.run(ids, attend)[-keep:])
