"""Single tokens of several texts: their attention over keys in pages, by a compiled kernel that reads them in place."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..runners.cpu.tables import CACHE_DTYPES, cache_kernels
from ..runners.cpu.threads import use_threads
from .kernel import AttentionScore
from .paged_rope import PagedRope

_MOST_KEYS = 256  # of a part


class PagedSteps:
    """The attention of single tokens. All layers share it.

    Shape letters: n tokens, H query heads, K key-value heads, D head dim, S tokens of a page.

    Args:
        tokens: the places of the tokens in the batch, int64 [n].
        positions: their positions in their texts, int64 [n].
        blocks: the pages of their texts, int64 [n, pages].
        page: S.
    """

    def __init__(self, rope: PagedRope, tokens: Tensor, positions: Tensor, blocks: Tensor, page: int) -> None:
        self._rope, self._tokens = rope, tokens
        angles = rope.query_angles(positions, torch.empty(0))
        self._angles = type(angles)(angles.cos[:, :, None], angles.sin[:, :, None])  # [bands, n, 1, d/2]
        temperature = rope.temperature(positions)
        self._temperature = None if temperature is None else temperature.float()[:, None, None]
        self._shifts = [rope.shifts(band, int(positions.max()) + 1) for band in range(len(rope.bands))]
        self._parts, self._firsts = self._divided(positions.numpy(), blocks.numpy(), page)
        self._scratch: tuple[NDArray[np.float32], ...] | None = None

    def reads(self, pages: Tensor, queries: Tensor) -> bool:
        """True if the kernel reads these pages [blocks, K, 2, S, D]."""
        D = pages.shape[-1]
        return pages.dtype in CACHE_DTYPES and D % 16 == 0 and pages.is_contiguous() and queries.shape[-1] == D

    def attend(self, q_THD: Tensor, pages: Tensor, score: AttentionScore, out_THD: Tensor) -> None:
        """Write the attention of the tokens into `out_THD`. Their keys are in the pages already."""
        from ..runners.cpu.kernels import paged

        _, K, _, S, D = pages.shape
        q = q_THD[self._tokens].float() * score.scale
        if self._temperature is not None:
            q = q * self._temperature
        rotated = self._rope.layout.rotate(q, self._angles).contiguous()  # [bands, n, H, D]
        n, H = q.shape[:2]
        layout = self._rope.layout
        shape = np.array([H, K, D, 0, 0, layout.start, layout.dim, layout.interleaved], np.int64)
        start, step = pages.data_ptr(), S * D
        places = np.array([start, start + step * pages.element_size(), pages.stride(0), pages.stride(1)], np.int64)
        result, (outs, peaks, sums) = torch.empty(n, H * D), self._buffers(H, D)
        paged(
            shape,
            np.array([score.softcap or 0], np.float32),
            cache_kernels(pages.dtype, any(shifts is not None for shifts in self._shifts)),
            rotated.numpy(),
            self._parts,
            self._firsts,
            places,
            outs,
            peaks,
            sums,
            result.numpy(),
            use_threads(),
        )
        out_THD[self._tokens] = result.view(n, H, D).to(out_THD.dtype)

    def _buffers(self, H: int, D: int) -> tuple[NDArray[np.float32], ...]:
        count = len(self._parts)
        if self._scratch is None or self._scratch[0].shape != (count, H, D):
            self._scratch = tuple(np.empty(shape, np.float32) for shape in ((count, H, D), (count, H), (count, H)))
        return self._scratch

    def _divided(
        self, positions: NDArray[np.int64], blocks: NDArray[np.int64], page: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The parts of all tokens, and the first part of each, as the kernel takes them."""
        bands, queries = self._rope.bands, torch.from_numpy(positions)
        starts, stops = (
            np.stack([border(queries).clamp(min=0).numpy() for border in borders], 1).ravel()  # [n * bands]
            for borders in ([band.start for band in bands], [band.stop for band in bands])
        )
        stops = np.maximum(stops, starts)
        size = math.gcd(page, _MOST_KEYS)
        counts = np.where(stops > starts, (stops - 1) // size - starts // size + 1, 0)
        owner = np.repeat(np.arange(len(counts)), counts)
        within = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
        pieces = starts[owner] // size + within
        low, high = np.maximum(starts[owner], pieces * size), np.minimum(stops[owner], (pieces + 1) * size)
        token, band = owner // len(bands), owner % len(bands)
        bases = np.array([0 if shifts is None else shifts.data_ptr() for shifts in self._shifts], np.int64)
        row = 4 * self._rope.layout.dim  # bytes of the cosines and sines of a key
        shift = np.where(bases[band] > 0, bases[band] + row * low, 0)
        parts = np.stack([token, band, blocks[token, low // page], low % page, high - low, shift], 1)
        firsts = np.concatenate([[0], np.cumsum(counts.reshape(len(positions), -1).sum(1))])
        return np.ascontiguousarray(parts), firsts
