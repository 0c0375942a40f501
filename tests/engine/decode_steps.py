"""Attention of a few tokens on random caches, as the operations of a GPU step take it, and its literal result."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ropewalk.engine.attention.rotation import Layout
from ropewalk.engine.kv_cache import CacheShape, Int8Layer, KVLayer
from ropewalk.engine.rotary_site import RotarySite
from ropewalk.engine.runners.gpu.ops import CacheRows, StepBands, TokenTree
from ropewalk.engine.runners.rotation_table import LayerGroup, RotationTable
from ropewalk.scaling import parse
from ropewalk.scaling.band import pair_positions
from ropewalk.scaling.configured_rope import ConfiguredRope
from ropewalk.scaling.rope import RopeSpec, Scaler

TRAINED = 64
MAPS = [
    "rerope:20",
    "leaky-rerope:20,k=4",
    "self-extend:4,window=20",
    "dpe:4/2,window=20",
    "dual-chunk:chunk=24,window=5",
    "string:window=5",
    "jet-long:20",
    "sink-window:30",
]
"""All position maps."""

SCALE = 0.3
HALVES = Layout(0, 16, False)


def rotate(x, layout, phases, factor=1.0):
    """Rotates the pairs of x [..., n, D], as complex numbers, by phases [n, half]; in float64."""
    columns = torch.arange(layout.start, layout.start + layout.dim)
    real, imaginary = (columns[0::2], columns[1::2]) if layout.interleaved else columns.chunk(2)
    x = x.double().clone()
    pairs = torch.complex(x[..., real], x[..., imaginary]) * torch.polar(torch.full_like(phases, factor), phases)
    x[..., real], x[..., imaginary] = pairs.real, pairs.imag
    return x


def rotation_table(spec, layout, window=None, length=256):
    """The rotation of a group of layers under a scaler."""
    rope = RopeSpec(dim=layout.dim if layout else 16, base=1e4, trained_length=TRAINED)
    site = RotarySite(module=nn.Module(), layer_type=None, configured=ConfiguredRope.of(rope, Scaler(), TRAINED))
    group = LayerGroup(site=site if layout else None, layout=layout, window=window)
    return RotationTable(group, site, parse(spec), length)


def random_layer(K, D, length, dtype, generator):
    """A cache with random keys and values, and after them numbers that must not be read."""
    layer = (Int8Layer if dtype == torch.int8 else KVLayer)(CacheShape(layers=1, heads=K, dim=D, dtype=dtype), length)
    layer.reserve(length + 7)
    for name in layer.buffers:
        buffer = getattr(layer, name)
        if buffer.dtype == torch.int8:
            numbers = torch.randint(-127, 128, buffer.shape, generator=generator)
        elif name.endswith("scales"):
            numbers = torch.rand(buffer.shape, generator=generator) / 60
        else:
            numbers = torch.randn(buffer.shape, generator=generator)
        numbers[:, :, length:] = 127 if buffer.dtype == torch.int8 else torch.nan
        buffer.copy_(numbers)
    layer.length = length
    return layer


def numbers(layer, name):
    """Keys or values in float64, [K, capacity, D]."""
    stored = getattr(layer, name)[0].double()
    return stored * getattr(layer, name[:-1] + "_scales")[0, ..., None] if isinstance(layer, Int8Layer) else stored


@dataclass
class DecodeStep:
    """The arguments of `Ops.attention`, and what they were made of."""

    table: RotationTable
    q: Tensor
    rows: CacheRows
    bands: StepBands
    softcap: float | None
    tree: TokenTree | None
    positions: list[int]

    @classmethod
    def random(
        cls, spec="none", *, layout=HALVES, window=None, softcap=None, paths=None, lengths=(97, 150, 40),
        tokens=(1, 2, 1), H=4, K=2, D=16, dtype=torch.float32, cache=None, size=1.0, seed=0,
    ):  # fmt: skip
        """A step of the last `tokens` of texts of these lengths.

        Args:
            paths: for a tree of the tokens of one text: the tokens before each and itself, as numbers of tokens.
            size: of the queries.
        """
        generator = torch.Generator().manual_seed(seed)
        table = rotation_table(spec, layout, window)
        texts = [random_layer(K, D, length, cache or dtype, generator) for length in lengths]
        tree = None
        if paths is None:
            layers = [text for text, count in zip(texts, tokens, strict=True) for _ in range(count)]
            positions = [n - c + i for n, c in zip(lengths, tokens, strict=True) for i in range(c)]
            slots = positions
        else:
            start, depth = lengths[0] - len(paths), max(map(len, paths))
            layers, slots = texts * len(paths), range(start, lengths[0])
            positions = [start + len(path) - 1 for path in paths]
            ancestors = [[start + n for n in path] + [-1] * (depth - len(path)) for path in paths]
            tree = TokenTree(start=start, ancestors=torch.tensor(ancestors, dtype=torch.int32))
        at = torch.tensor(positions).numpy()
        half = layout.dim // 2 if layout else 8
        edges = torch.zeros(len(positions), len(table.bands), 2, dtype=torch.int32)
        for n, position in enumerate(positions):
            for band, first, count in table.visible(position):
                edges[n, band] = torch.tensor([first, first + count])
        shifts = [table.shifts(band, max(positions) + 1) for band in range(len(table.bands))]
        bands = StepBands(
            queries=torch.from_numpy(table.angles(at, half)[0]),
            edges=edges,
            scales=torch.from_numpy(table.scales(at, SCALE)),
            shifts=tuple(None if rows is None else torch.from_numpy(rows) for rows in shifts),
        )
        q = (size * torch.randn(len(positions), H, D, generator=generator)).to(dtype)
        return cls(table, q, CacheRows.of(layers, torch.tensor(slots)), bands, softcap, tree, positions)

    def run(self, ops):
        """What an `Ops` gives."""
        return ops.attention(self.q, self.rows, self.bands, self.table.group.layout, self.softcap, self.tree)

    def expected(self):
        """The same in float64 from the keys without rotation: one score at a time is rotated as its band says."""
        return torch.stack([self._expected(n, position) for n, position in enumerate(self.positions)])

    def _expected(self, n, position):
        table, layer, layout = self.table, self.rows.layers[n], self.table.group.layout
        keys, values = numbers(layer, "keys"), numbers(layer, "values")
        place = torch.arange(position + 1)
        slots = place.clone()
        if self.tree is not None:
            slots[self.tree.start :] = self.tree.ancestors[n, : position + 1 - self.tree.start]
        keys, values = keys[:, slots], values[:, slots]
        w, m = table.frequencies.inv_freq, table.frequencies.attention_factor
        if layout:
            keys = rotate(keys, layout, -table.key_phases(place), 1 / table.key_factor)
        here = torch.tensor([position])
        temperature = table.temperature(here)
        temperature = 1.0 if temperature is None else temperature
        group = self.q.shape[1] // len(keys)
        keys, values = (x.repeat_interleave(group, 0) for x in (keys, values))
        scores = torch.full((self.q.shape[1], position + 1), -torch.inf, dtype=torch.float64)
        for band in table.bands:
            q, k = self.q[n].double()[:, None], keys
            if layout:
                q = rotate(q, layout, pair_positions(band.query, here) * w, m)
                k = rotate(k, layout, pair_positions(band.key, place) * w, m)
            seen = (band.start(here) <= place) & (place < band.stop(here))
            if table.group.window is not None:
                seen &= place > position - table.group.window
            scores = torch.where(seen, (q @ k.mT)[:, 0], scores)
        scores = scores * SCALE * temperature
        if self.softcap is not None:
            scores = torch.where(scores.isinf(), scores, self.softcap * torch.tanh(scores / self.softcap))
        return (torch.softmax(scores, -1)[:, None] @ values).flatten()


def difference(got, expected):
    """The Euclidean norm of the difference over that of the expected numbers."""
    return float((got.double() - expected.double()).norm() / expected.double().norm())
