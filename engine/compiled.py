"""A network of our own on the CPU: a step of decoding in one compiled function, a chunk of a prompt in torch.

Arithmetic is float32 throughout. Weights stay as the model holds them, in bfloat16 or int8 too, and are widened as
they are read; so do keys and values.

Shape suffixes: N tokens of a chunk, E hidden size, H query heads, K key-value heads, M keys, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path as Folder
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, silu
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from ..errors import ConfigError, UnsupportedModel
from ..scaling.band import Band, same
from ..scaling.rope import Scaler
from .attention import causal_attention
from .banded import banded_attention
from .cache import rewind
from .family import Decoder, Linear, decoder
from .kernel import Score
from .kernels import UNAVAILABLE
from .kv_cache import CacheShape, KVCache, KVLayer
from .memory import check_room
from .network import Network, Path, Setting
from .plan import Segment
from .probe import LayerRope, layer_ropes, logits, probe_ids
from .rotary import RotarySite, headline
from .rotation import Layout, angles
from .rows import Run
from .turns import Group, Turns, retune

Tree = tuple[int, list[list[int]]]

FEW = 16  # tokens up to which the compiled step is faster than a chunk in torch

_KINDS = {torch.float32: np.float32, torch.bfloat16: np.uint16, torch.int8: np.int8}
_VERIFIED = {torch.float32: 1e-4}  # difference of the logits, of their size, in the Euclidean norm
_VERIFIED_16_BIT = 3e-2
_HEAD_ROWS = 8192  # of the vocabulary that are widened at a time


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
        if hf.device.type != "cpu" or hf.dtype not in (torch.float32, torch.bfloat16):
            raise UnsupportedModel(f"compiled kernels run on the CPU in float32 or bfloat16, not {hf.dtype}")
        self._decoder = decoder(hf)
        self._dtype, self._folder = hf.dtype, None
        self._headline = headline(sites)
        ropes = layer_ropes(hf, sites)
        self._groups, self._group_of = _groups(self._decoder, ropes)
        self._tables = _Tables.of(self._decoder, self._groups, self._group_of)
        self._scratch = torch.empty(0)
        self._turns: list[Turns] = []
        self.use(Scaler(), None)
        self._verify()  # before anything is rounded
        if weights == "int8":
            self._tables = _Tables.of(self._decoder, self._groups, self._group_of, Stored.in_int8)
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
        weights, cache = _name(self._tables.stored_head.weight.dtype), _name(self._dtype)
        if weights == cache == "float32":
            return weights
        return f"{weights}, {cache} cache, float32 arithmetic"

    @property
    def how(self) -> str:
        """What runs the model."""
        import numba

        return (
            f"compiled steps (numba {numba.__version__}, {numba.get_num_threads()} threads), chunks in torch; weights "
            f"in {self.weights}, cache in {_name(self._dtype)}, arithmetic in float32"
        )

    @property
    def weights(self) -> str:
        return _name(self._tables.stored_head.weight.dtype)

    def use(self, scaler: Scaler, length: int | None) -> None:
        before = self._setting
        if self._dtype == torch.int8 and scaler.member("positions"):
            raise ConfigError(f"{scaler} holds its keys in several forms, an int8 cache in one; leave out kv_dtype")
        own = [group.site.configured.scaler for group in self._groups if group.site]  # LongRoPE, where a model has it
        self._setting = scaler, length if any(one.depends_on_length for one in (scaler, *own)) else None
        if before != self._setting or not self._turns:
            self._turns = [Turns(group, self._headline, *self._setting) for group in self._groups]

    @property
    def cache_shape(self) -> CacheShape:
        """What a cache of this network looks like."""
        d = self._decoder
        return CacheShape(
            layers=len(d.layers), heads=d.key_heads, dim=d.head_dim, dtype=self._dtype, folder=self._folder
        )

    def check_room(self, tokens: int) -> None:
        check_room(self.cache_shape, tokens, 1 + max(len(turns.key_bands) for turns in self._turns))

    def new_cache(self, capacity: int) -> KVCache:
        return KVCache(self.cache_shape, capacity)

    @torch.no_grad()
    def forward(self, ids: Sequence[int], cache: Cache, keep: int) -> Tensor:
        if not isinstance(cache, KVCache):
            return super().forward(ids, cache, keep)
        if len(ids) <= FEW:
            return self._few([(ids, cache)], keep)
        return self._many(ids, cache, keep)

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
        return found[torch.tensor(counts).cumsum(0) - 1]

    def _verify(self) -> None:
        """Refuse unless both ways of running give the logits of the model's own modules."""
        with torch.inference_mode():
            expected = logits(self.hf)[0].float()
            ids: list[int] = probe_ids(self.hf)[0].tolist()
            caches = self.new_cache(len(ids)), self.new_cache(len(ids))
            for found in (self._few([(ids, caches[0])], len(ids)), self._many(ids, caches[1], len(ids))):
                difference = float((found - expected).norm() / expected.norm())
                if not difference < _VERIFIED.get(self._dtype, _VERIFIED_16_BIT):
                    raise UnsupportedModel(
                        f"{type(self.hf).__name__} computes something else than its family's description says (its "
                        f"logits differ by {difference:.2g} of their size)"
                    )

    def retune(self, cache: Cache, before: Setting) -> None:
        """Turn the keys of a cache that was filled under `before` to what the scaler in use asks for, in place."""
        used = dict(zip(self._groups, self._turns, strict=True))
        for index, layer in enumerate(cache.layers):
            group = self._groups[self._group_of[index]]
            retune(layer, Turns(group, self._headline, *before), used[group])

    # A few tokens

    def _few(self, rows: Sequence[tuple[Sequence[int], KVCache]], keep: int, tree: Tree | None = None) -> Tensor:
        """Tokens of any sequences, by the compiled step: the logits of the last `keep`, [keep, V].

        Args:
            tree: tokens held before a tree, and for each of its tokens the places of those that it follows, and its
                own.
        """
        threads = _share_threads()
        from .kernels import step  # compiles, or reads what an earlier process compiled

        ids = [token for own, _ in rows for token in own]
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
            _KINDS[self._dtype],
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
        return self._capped(torch.from_numpy(found))

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
        start, count = cache.length, len(ids)
        run = Run(None, 0, count, 0, start + count, 0)
        chunk = [_Chunk(turns, run) for turns in self._turns]
        d = self._decoder
        x_NE = d.embedding(torch.tensor(ids)).float()
        for index, layer in enumerate(d.layers):
            query, key, value, out, gate, up, down = self._tables.stored[index]
            before, after, before_mlp, after_mlp, *head_norms = layer.norms
            normed = _rms(x_NE, before, d.epsilon)
            q, k, v = (self._apply(one, normed) for one in (query, key, value))
            if not d.norms_whole:
                q, k, v = (x.view(count, -1, d.head_dim) for x in (q, k, v))
            q, k = (_rms(x, norm, d.epsilon) for x, norm in zip((q, k), head_norms, strict=True))
            q, k, v = (x.reshape(count, -1, d.head_dim).transpose(0, 1)[None] for x in (q, k, v))
            score = Score(scale=layer.scale, softcap=layer.softcap)
            mixed = chunk[self._group_of[index]].attend(q, k, v, cache.layers[index], score)
            x_NE = x_NE + _rms(self._apply(out, mixed[0].transpose(0, 1).reshape(count, -1)), after, d.epsilon)
            normed = _rms(x_NE, before_mlp, d.epsilon)
            gated = self._apply(gate, normed)
            gated = silu(gated, inplace=True) if d.activation == "silu" else gelu(gated, approximate="tanh")
            x_NE = x_NE + _rms(self._apply(down, gated.mul_(self._apply(up, normed))), after_mlp, d.epsilon)
        last = _rms(x_NE[-keep:], d.final_norm, d.epsilon)
        head = self._tables.stored_head
        rows = range(0, head.weight.shape[0], _HEAD_ROWS)
        return self._capped(torch.cat([self._apply(head.rows(r, r + _HEAD_ROWS), last) for r in rows], -1))

    def _apply(self, one: Stored, x: Tensor) -> Tensor:
        weight = one.weight
        if weight.dtype != torch.float32:
            if self._scratch.numel() < weight.numel():
                with torch.inference_mode(False):  # so that calls outside of it may write there too
                    self._scratch = torch.empty(weight.numel())
            weight = self._scratch[: weight.numel()].view(weight.shape).copy_(weight)
        if one.scale is None:
            return linear(x, weight, one.bias)
        out = linear(x, weight).mul_(one.scale)
        return out if one.bias is None else out.add_(one.bias)

    def _capped(self, found: Tensor) -> Tensor:
        cap = self._decoder.softcap
        return found if cap is None else torch.tanh(found / cap) * cap


class _Chunk:
    """Attention of one chunk in one group of layers, with what all its layers share."""

    def __init__(self, turns: Turns, run: Run) -> None:
        self._turns = turns
        self._run = run
        group, site = turns.group, turns.plan.site
        where = torch.arange(run.key_stop - run.query_stop, run.key_stop)
        self._angles = None
        if group.layout is not None and not turns.mapped:
            f = turns.frequencies
            self._angles = angles(where.double(), f.inv_freq, factor=f.attention_factor, like=torch.empty(0))
        self._temperature = None
        if turns.tempered and not turns.mapped:
            self._temperature = site.logit_factor(turns.plan.scaler, where).float()[:, None]
        self._work: list[tuple[Run, list[Segment]]] | None = None
        if turns.mapped:
            self._work = [(run, turns.plan.segments(run))]
        elif group.window is not None and run.key_stop > group.window:
            self._work = [(run, [_window(turns, run, group.window)])]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: KVLayer, score: Score) -> Tensor:
        """q [1, H, N, D], k and v [1, K, N, D] as they are projected; writes the cache; [1, H, N, D]."""
        layout = self._turns.group.layout
        if self._turns.mapped:
            keys, values = layer.update(k, v)
            assert self._work is not None
            return banded_attention(q, keys, values, score, layout, self._work, turned=layer.turned)
        if layout is not None:
            assert self._angles is not None
            q, k = layout.rotate(q, self._angles), layout.rotate(k, self._angles)
        if self._temperature is not None:
            q = q * self._temperature
        keys, values = layer.update(k, v)
        if self._work is None:
            return causal_attention(q, keys, values, score)
        return banded_attention(q, keys, values, score, None, self._work)


def _window(turns: Turns, run: Run, window: int) -> Segment:
    """The queries of a run under a sliding window, as one band."""
    band = Band(
        name="window",
        start=lambda i: (i - window + 1).clamp(min=0),
        stop=lambda i: i + 1,
        query=same,
        key=same,
    )
    return Segment(
        scaler=turns.plan.scaler,
        start=0,
        stop=run.query_stop,
        length=None,
        first=0,
        offset=run.key_stop - run.query_stop,
        bands=(band,),
        frequencies=turns.frequencies,
        temperature=None,
    )


def _rms(x: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
    if weight is None:
        return x
    return torch.nn.functional.rms_norm(x, weight.shape, weight, epsilon)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _share_threads() -> int:
    """Let the kernels use as many threads as torch does; their number."""
    import numba

    wanted = torch.get_num_threads()
    threads: int = min(wanted, numba.config.NUMBA_NUM_THREADS)
    numba.set_num_threads(threads)
    if torch.get_num_threads() != wanted:  # both use OpenMP, and numba's start gives it as many as there are cores
        torch.set_num_threads(wanted)
    return threads


def _groups(d: Decoder, ropes: dict[int, LayerRope]) -> tuple[list[Group], list[int]]:
    """Layers that turn alike, and the group of every layer."""
    groups: dict[tuple[RotarySite | None, Layout | None, int | None], int] = {}
    found = []
    for index, layer in enumerate(d.layers):
        rope = ropes[index]
        if rope.is_local != (layer.window is not None):
            raise UnsupportedModel(f"layer {index} is local in a way that is not a sliding window")
        key = (rope.site, rope.layout, layer.window)
        found.append(groups.setdefault(key, len(groups)))
    layouts = {layout for _, layout, _ in groups if layout is not None}
    if len(layouts) > 1:
        raise UnsupportedModel("its layers lay out their rotary pairs differently")
    return [Group(*key) for key in groups], found


@dataclass(frozen=True)
class Stored:
    """A linear as the kernels read it: weights in their own dtype, float32 scales and bias [rows] or None."""

    weight: Tensor
    scale: Tensor | None
    bias: Tensor | None

    @classmethod
    def of(cls, one: Linear) -> Stored:
        """The model's own weights, not copied."""
        return cls(one.weight.contiguous(), None, None if one.bias is None else one.bias.float())

    @classmethod
    def in_int8(cls, one: Linear) -> Stored:
        """Every row in whole steps of a 127th of its largest weight."""
        weight = one.weight.float()
        scale = weight.abs().amax(1).clamp(min=1e-30) / 127
        return cls((weight / scale[:, None]).round_().to(torch.int8), scale, Stored.of(one).bias)

    def rows(self, start: int, stop: int) -> Stored:
        """Some of its rows."""
        scale, bias = (None if x is None else x[start:stop] for x in (self.scale, self.bias))
        return Stored(self.weight[start:stop], scale, bias)

    @property
    def table(self) -> list[int]:
        """As `project_rows` takes it."""
        scale, bias = (0 if x is None else x.data_ptr() for x in (self.scale, self.bias))
        return [self.weight.data_ptr(), scale, bias, *self.weight.shape]


Make = Callable[[Linear], Stored]


def _check_sizes(d: Decoder) -> None:
    """Refuse what the kernels, which see addresses only, would read past the end of."""
    E, q, k = len(d.final_norm), d.heads * d.head_dim, d.key_heads * d.head_dim
    inner = len(d.layers[0].linears[4].weight)
    uneven = [size for size in (E, q, inner, d.head_dim) if size % 16]
    if uneven:
        raise UnsupportedModel(f"compiled kernels need sizes that are a multiple of 16, which {uneven[0]} is not")
    shapes = [(q, E), (k, E), (k, E), (E, q), (inner, E), (inner, E), (E, inner)]
    head_norms = (q, k) if d.norms_whole else (d.head_dim, d.head_dim)
    for index, layer in enumerate(d.layers):
        linears = [tuple(one.weight.shape) for one in layer.linears] == shapes
        norms = all(
            norm is None or len(norm) == n for norm, n in zip(layer.norms, (E, E, E, E, *head_norms), strict=True)
        )
        if not (linears and norms):
            raise UnsupportedModel(
                f"the weights of layer {index} are not of the sizes that its family's description says"
            )
    dtypes = {one.weight.dtype for one in (*(one for layer in d.layers for one in layer.linears), d.head)}
    if len(dtypes) > 1:
        raise UnsupportedModel(
            f"its linear layers are of more than one dtype ({', '.join(sorted(map(_name, dtypes)))})"
        )


@dataclass(frozen=True)
class _Tables:
    """The decoder as the compiled step takes it, and the tensors that its addresses point into."""

    shape: np.ndarray[Any, Any]
    numbers: np.ndarray[Any, Any]
    kind: type
    linears: np.ndarray[Any, Any]
    norms: np.ndarray[Any, Any]
    groups: np.ndarray[Any, Any]
    head: np.ndarray[Any, Any]
    half: int
    stored: list[tuple[Stored, ...]] = field(repr=False)
    stored_head: Stored = field(repr=False)

    @classmethod
    def of(cls, d: Decoder, groups: list[Group], group_of: list[int], make: Make | None = None) -> _Tables:
        """Raises UnsupportedModel where a kernel's assumption does not hold."""
        make = make or Stored.of
        stored = [tuple(map(make, layer.linears)) for layer in d.layers]
        head = make(d.head)
        _check_sizes(d)
        if len({(layer.scale, layer.softcap) for layer in d.layers}) > 1:
            raise UnsupportedModel("its layers scale their scores differently")
        layout = next((group.layout for group in groups if group.layout is not None), None)
        if layout is None:
            raise UnsupportedModel("no layer turns its queries and keys")
        norms = [[0 if norm is None else norm.data_ptr() for norm in layer.norms] for layer in d.layers]
        shape = [d.heads, d.key_heads, d.head_dim, {"silu": 0, "gelu_tanh": 1}[d.activation], d.norms_whole]
        return cls(
            shape=np.array([*shape, layout.start, layout.dim, layout.interleaved], np.int64),
            numbers=np.array([d.epsilon, d.layers[0].softcap or 0], np.float32),
            kind=_KINDS[head.weight.dtype],
            linears=np.array([[one.table for one in linears] for linears in stored], np.int64),
            norms=np.array([*norms, [d.final_norm.data_ptr(), 0, 0, 0, 0, 0]], np.int64),
            groups=np.array(group_of, np.int64),
            head=np.array([head.table], np.int64),
            half=layout.dim // 2,
            stored=stored,
            stored_head=head,
        )
