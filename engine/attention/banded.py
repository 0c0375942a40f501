"""Banded attention: a scaler's position map, frequencies and temperature applied to un-rotated queries and keys.

Every (query, key) pair is scored once, in the band that the map puts it in; the parts are joined by their
log-sum-exp. Nothing of the size of the square is ever held.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..cache import RotatedKeys
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
    """Attention of un-rotated queries over un-rotated keys.

    Args:
        layout: where the rotary pairs lie; None for layers without rotation.
        work: the runs of the batch with their segments.
        sinks_H: the model's own attention sinks, a logit per head that takes weight and gives nothing.
        rotated: rotated keys of earlier calls, extended here.

    Returns:
        [B, H, N, Dv]; zeros for padding.
    """
    B, H, N, _ = q_BHND.shape
    rows = []
    for run, segments in work:
        q = _part(q_BHND, run.row, run.query_start, run.query_stop)
        k, v = (_part(t, run.row, run.key_start, run.key_stop) for t in (k_BKMD, v_BKMD))
        held = rotated if run.row is None and run.key_start == 0 else None
        parts = [
            _segment(q, k, v, score, layout, segment, sinks_H, held if segment is segments[-1] else None)
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
    """Places [start, stop) of dimension 2, of one row or all; a step of decoding makes many of these."""
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
    if segment.temperature is not None:
        q = (q * segment.temperature.to(q.device)[:, None]).to(q.dtype)
    queries, keys = dict.fromkeys(segment.used_bands, q), dict.fromkeys(segment.used_bands, (k, 0))
    if layout is not None:
        queries = dict(zip(segment.used_bands, layout.rotate(q, segment.query_angles(q)), strict=True))
        maps = {segment.key_map(band) for band in segment.used_bands}
        rotated_keys = {key_map: _rotated_keys(k, layout, segment, key_map, rotated) for key_map in maps}
        keys = {band: rotated_keys[segment.key_map(band)] for band in segment.used_bands}

    def block_attention(block: Block) -> Tensor:
        return _block(queries, keys, v, score, block, segment.offset + segment.start, sinks)

    outs = [_checkpointed(block_attention, block) for block in segment.blocks]
    return outs[0] if len(outs) == 1 else torch.cat(outs, 2)


def _checkpointed(block_attention: Callable[[Block], Tensor], block: Block) -> Tensor:
    """For training, scores are computed again on the way back, so that memory stays linear in the context."""
    if torch.is_grad_enabled():
        out: Tensor = checkpoint(block_attention, block, use_reentrant=False)
        return out
    return block_attention(block)


def _rotated_keys(
    k: Tensor, layout: Layout, segment: Segment, band: int, rotated: RotatedKeys | None
) -> tuple[Tensor, int]:
    """Keys as `band` sees them, and the index of the first of them."""

    start, stop = segment.key_range(band)
    if not segment.rotates(band):
        return k, 0

    def rotate(start: int, stop: int) -> Tensor:
        return layout.rotate(k[:, :, start:stop], segment.key_angles(band, start, stop, k))

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
    """`out` and `lse` with a part joined into some of their rows; in place where no gradient needs what was there."""
    joined_out, joined_lse = join(out[:, :, rows], lse[:, :, rows], part_out, part_lse)
    if joined_out.shape == out.shape:
        return joined_out, joined_lse
    if torch.is_grad_enabled():
        before, behind = slice(0, rows.start), slice(rows.stop, None)
        return tuple(  # type: ignore[return-value]
            torch.cat((whole[:, :, before], part, whole[:, :, behind]), 2)
            for whole, part in ((out, joined_out), (lse, joined_lse))
        )
    out[:, :, rows], lse[:, :, rows] = joined_out, joined_lse
    return out, lse
