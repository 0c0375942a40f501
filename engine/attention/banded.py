"""Attention under a position map (ReRoPE, Self-Extend, Dual Chunk): keys are rotated band by band.

It applies the scaler's map, frequencies and temperature to un-rotated queries, and to keys that are un-rotated or
rotated as a cache holds them.

Each (query, key) pair is scored once, in its band of the position map. The parts are joined by their log-sum-exp. The
full score matrix is never stored.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..rotated_keys import RotatedKeys
from .blocks import Block
from .kernel import AttentionScore, attend, join
from .plan import Segment
from .rotation import Layout
from .rows import KeyRun


def banded_attention(
    q_BHND: Tensor,
    k_BKMD: Tensor,
    v_BKMD: Tensor,
    score: AttentionScore,
    layout: Layout | None,
    work: list[tuple[KeyRun, list[Segment]]],
    sinks_H: Tensor | None = None,
    rotated: RotatedKeys | None = None,
) -> Tensor:
    """Attention of un-rotated queries over keys that are rotated to `Segment.stored`.

    Args:
        layout: the places of the rotary pairs; None for a layer without rotation.
        work: the runs of the batch, each with its segments.
        sinks_H: the model's own attention sinks: one logit a head, which takes weight and has no value.
        rotated: rotated keys of earlier calls. The keys of this call are added. None rotates the keys that a call
            reads, in temporary memory.

    Returns:
        [B, H, N, Dv], with zeros for padding.
    """
    B, H, N, _ = q_BHND.shape
    rows = []
    for run, segments in work:
        q = _part(q_BHND, run.row, run.query_start, run.query_stop)
        k, v = (_part(t, run.row, run.key_start, run.key_stop) for t in (k_BKMD, v_BKMD))
        cached = rotated if run.row is None and run.key_start == 0 else None
        parts = [
            _segment(q, k, v, score, layout, segment, sinks_H, cached if segment is segments[-1] else None)
            for segment in segments
        ]
        out = parts[0] if len(parts) == 1 else torch.cat(parts, 2)
        if run.row is None and out.shape[2] == N:
            return out
        rows.append((run, out))
    whole = q_BHND.new_zeros(B, H, N, v_BKMD.shape[-1])
    for run, out in rows:
        _part(whole, run.row, run.query_start, run.query_stop).copy_(out)
    return whole


def _part(x: Tensor, row: int | None, start: int, stop: int) -> Tensor:
    """Indices [start, stop) of dimension 2, of one row or of all; a view, or `x` itself where nothing is cut."""
    if row is not None:
        x = x[row : row + 1]
    return x if start == 0 and stop == x.shape[2] else x[:, :, start:stop]


def _segment(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score: AttentionScore,
    layout: Layout | None,
    segment: Segment,
    sinks: Tensor | None,
    rotated: RotatedKeys | None,
) -> Tensor:
    q = _part(q, None, segment.start, segment.stop)
    if (temperature := segment.temperature_on(q.device)) is not None:
        q = (q * temperature[:, None]).to(q.dtype)
    queries, keys = dict.fromkeys(segment.used_bands, q), dict.fromkeys(segment.used_bands, (k, 0))
    if layout is not None:
        queries = dict(zip(segment.used_bands, layout.rotate(q, segment.query_angles(q)), strict=True))
        maps = {segment.key_map(band) for band in segment.used_bands}
        rotated_keys = {key_map: _rotated_keys(q, k, layout, segment, key_map, rotated) for key_map in maps}
        keys = {band: rotated_keys[segment.key_map(band)] for band in segment.used_bands}

    def block_attention(block: Block) -> Tensor:
        return _block(queries, keys, v, score, block, segment.offset + segment.start, sinks)

    outs = [_checkpointed(block_attention, block) for block in segment.blocks_on(q.device)]
    return outs[0] if len(outs) == 1 else torch.cat(outs, 2)


def _checkpointed(block_attention: Callable[[Block], Tensor], block: Block) -> Tensor:
    """In training, the backward pass computes scores again, so that memory is linear in the context."""
    if torch.is_grad_enabled():
        out: Tensor = checkpoint(block_attention, block, use_reentrant=False)
        return out
    return block_attention(block)


def _rotated_keys(
    q: Tensor, k: Tensor, layout: Layout, segment: Segment, band: int, rotated: RotatedKeys | None
) -> tuple[Tensor, int]:
    """The keys as `band` reads them, and the index of the first of them in the run."""
    start, stop = segment.key_range(band)
    if not segment.rotates(band):
        return k, 0

    def rotate(start: int, stop: int) -> Tensor:
        keys = k[:, :, start:stop].to(q.dtype)  # a cache may be narrower than the arithmetic
        return layout.rotate(keys, segment.key_angles(band, start, stop, q))

    if rotated is None:
        return rotate(start, stop), start
    return rotated.get((segment.scaler, segment.length, segment.first), band, k[:, :, :stop], rotate), 0


def _block(
    queries: dict[int, Tensor],
    keys: dict[int, tuple[Tensor, int]],
    v: Tensor,
    score: AttentionScore,
    block: Block,
    query_offset: int,
    sinks: Tensor | None,
) -> Tensor:
    out = lse = None
    for piece in block.pieces:
        k, first_key = keys[piece.band]
        part_out, part_lse = attend(
            _part(queries[piece.band], None, piece.query_start - query_offset, piece.query_stop - query_offset),
            _part(k, None, piece.key_start - first_key, piece.key_stop - first_key),
            _part(v, None, piece.key_start, piece.key_stop),
            score,
            piece.sees,
        )
        if out is None or lse is None:
            assert (piece.query_start, piece.query_stop) == (block.start, block.stop)
            out, lse = part_out, part_lse
            continue
        rows = slice(piece.query_start - block.start, piece.query_stop - block.start)
        out, lse = _joined(out, lse, rows, part_out, part_lse)
    assert out is not None and lse is not None
    if sinks is not None:
        out = out * torch.sigmoid(lse - sinks[:, None].to(lse.dtype)).unsqueeze(-1).to(out.dtype)
    return out


def _joined(out: Tensor, lse: Tensor, rows: slice, part_out: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Join a part into some rows of `out` and `lse`, in place if no gradient is recorded."""
    joined_out, joined_lse = join(out[:, :, rows], lse[:, :, rows], part_out, part_lse)
    if joined_out.shape == out.shape:
        return joined_out, joined_lse
    if torch.is_grad_enabled():
        before, after = slice(0, rows.start), slice(rows.stop, None)
        return tuple(  # type: ignore[return-value]
            torch.cat((whole[:, :, before], part, whole[:, :, after]), 2)
            for whole, part in ((out, joined_out), (lse, joined_lse))
        )
    out[:, :, rows], lse[:, :, rows] = joined_out, joined_lse
    return out, lse
