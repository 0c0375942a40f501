"""Attention over keys in pages, as serving engines store them: a scaler on a batch of texts of all lengths.

A page holds the keys and values of a few consecutive tokens of one text. Every key is stored once, rotated by the key
map of the bands that see most keys (`stored_key_map`), which depends on its own position only. So texts with the same
beginning can share its pages. A text's last token is computed by a compiled kernel that reads the pages in place, and
longer ends of a text by `banded_attention` over a copy of its keys.

Shape letters: T tokens of the batch, R texts, H query heads, K key-value heads, D head dim, S tokens of a page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...errors import RopewalkWarning, warn
from .banded import banded_attention
from .kernel import AttentionScore
from .paged_rope import PagedRope
from .plan import Segment
from .rotation import Angles
from .rows import KeyRun, first_seen

if TYPE_CHECKING:
    from .paged_products import ChunkProducts
    from .paged_steps import PagedSteps


@dataclass(frozen=True)
class Chunk:
    """Tokens [start, stop) of a batch: the last of `length` tokens of the text in row `row` of the block table."""

    row: int
    start: int
    stop: int
    length: int


def chunks_of(starts: Sequence[int], lengths: Sequence[int]) -> list[Chunk]:
    """The chunks of a batch; rows without tokens are left out.

    Args:
        starts: the first token of each text in the batch, and the number of all tokens.
        lengths: tokens of each text, with those of the batch.
    """
    return [
        Chunk(row, start, stop, length)
        for row, (start, stop, length) in enumerate(zip(starts, starts[1:], lengths, strict=False))
        if stop > start
    ]


@cache
def _warn_of_copies(reason: str) -> None:
    """Say once why single tokens are slow."""
    warn(RopewalkWarning(f"the keys of a text are copied for each of its tokens, which is slow: {reason}"))


def _has_products(q: Tensor, pages: Tensor) -> bool:
    """True if the compiled kernel with bfloat16 products computes the attention of longer ends of a text."""
    from ..runners.cpu.kernels import HAS_BFLOAT16_PRODUCTS

    return HAS_BFLOAT16_PRODUCTS and q.dtype == pages.dtype == torch.bfloat16 and q.shape[-1] % 16 == 0


class PagedBatch:
    """One forward pass of a batch. All layers share it, since it does not depend on the layer.

    Args:
        starts, lengths: as for `chunks_of`.
        blocks: block table, int [R, pages]: the page of each S tokens of a text.
        page: S.
    """

    def __init__(
        self, rope: PagedRope, starts: Sequence[int], lengths: Sequence[int], blocks: Tensor, page: int
    ) -> None:
        self.rope, self._blocks, self._page = rope, blocks.long(), page
        chunks = chunks_of(starts, lengths)
        self.tokens = sum(chunk.stop - chunk.start for chunk in chunks)
        self._single = [chunk for chunk in chunks if chunk.stop - chunk.start == 1]
        self._longer = [chunk for chunk in chunks if chunk.stop - chunk.start > 1]
        counts = torch.tensor([chunk.stop - chunk.start for chunk in chunks])
        rows = torch.tensor([chunk.row for chunk in chunks]).repeat_interleave(counts)
        ends = torch.tensor([chunk.length - chunk.stop for chunk in chunks]).repeat_interleave(counts)
        self._positions = torch.arange(self.tokens) + ends
        self._places = self._blocks[rows, self._positions // page], self._positions % page
        self._segments: dict[Chunk, Segment] = {}  # all layers share them
        self._products: dict[Chunk, ChunkProducts] = {}
        self._key_angles: dict[torch.dtype, Angles] = {}

    def write(self, k_TKD: Tensor, v_TKD: Tensor, pages: Tensor) -> None:
        """Rotate the keys of the batch and write them and the values into the pages of a layer.

        Args:
            k_TKD: un-rotated keys.
            pages: [blocks, K, 2, S, D], keys and values.
        """
        if k_TKD.dtype not in self._key_angles:
            found = self.rope.key_angles(self._positions, k_TKD)
            self._key_angles[k_TKD.dtype] = Angles(found.cos[:, None], found.sin[:, None])
        block, place = self._places
        pages[block, :, 0, place] = self.rope.layout.rotate(k_TKD, self._key_angles[k_TKD.dtype]).to(pages.dtype)
        pages[block, :, 1, place] = v_TKD.to(pages.dtype)

    def attend(self, q_THD: Tensor, pages: Tensor, score: AttentionScore, out_THD: Tensor) -> None:
        """Attention of un-rotated queries over the pages of a layer, which hold the keys of the batch already."""
        steps = self._steps
        if steps is not None and steps.reads(pages, q_THD):
            steps.attend(q_THD, pages, score, out_THD)
        else:
            if self._single:
                from ..runners.cpu.kernels import UNAVAILABLE

                _warn_of_copies(
                    UNAVAILABLE or f"the kernel does not read {pages.dtype} keys of {pages.shape[-1]} numbers"
                )
            for chunk in self._single:
                self._attend_chunk(chunk, q_THD, pages, score, out_THD)
        for chunk in self._longer:
            self._attend_chunk(chunk, q_THD, pages, score, out_THD)

    @cached_property
    def _steps(self) -> PagedSteps | None:
        from ..runners.cpu.kernels import UNAVAILABLE  # numba must not be loaded before vLLM has started its worker

        if not self._single or UNAVAILABLE is not None:
            return None
        from .paged_steps import PagedSteps

        tokens = torch.tensor([chunk.start for chunk in self._single])
        blocks = self._blocks[[chunk.row for chunk in self._single]]
        return PagedSteps(self.rope, tokens, self._positions[tokens], blocks, self._page)

    def _attend_chunk(self, chunk: Chunk, q: Tensor, pages: Tensor, score: AttentionScore, out: Tensor) -> None:
        count, length = chunk.stop - chunk.start, chunk.length
        page = first_seen(self.rope.window, count, length) // self._page
        k, v = self._gathered(pages, chunk, page)
        queries, first = q[chunk.start : chunk.stop].transpose(0, 1), page * self._page
        if _has_products(q, pages):
            from .paged_products import ChunkProducts

            if chunk not in self._products:
                self._products[chunk] = ChunkProducts(self.rope, count, length, first)
            mixed = self._products[chunk].attend(queries, k[0], v[0], score)
        else:
            if chunk not in self._segments:
                self._segments[chunk] = self.rope.segment(count, length, first)
            run = KeyRun(None, 0, count, 0, k.shape[2], first)
            work = [(run, [self._segments[chunk]])]
            mixed = banded_attention(queries[None], k, v, score, self.rope.layout, work)[0]
        out[chunk.start : chunk.stop] = mixed.transpose(0, 1)

    def _gathered(self, pages: Tensor, chunk: Chunk, page: int) -> tuple[Tensor, Tensor]:
        """The keys and values of a text from a page on, each [1, K, M, D], from [blocks, K, 2, S, D]."""
        blocks = self._blocks[chunk.row, page : -(-chunk.length // self._page)]
        # indexing reads these pages only; `index_select` copies the whole of a tensor that is not contiguous
        k, v = pages[blocks].permute(2, 1, 0, 3, 4).flatten(2, 3)[:, None, :, : chunk.length - page * self._page]
        return k, v
