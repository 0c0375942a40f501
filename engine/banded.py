"""Banded attention: a scaler's position map, frequencies and temperature applied to un-rotated queries and keys.

Every (query, key) pair is scored once, in the band that the map puts it in; the parts are joined by their
log-sum-exp. Nothing of the size of the square is ever held.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..scaling.band import Band
from ..scaling.rope import Frequencies, Scaler
from .blocks import Block, blocks
from .cache import TurnedKeys
from .kernel import Score, attend, join
from .rotary import RotarySite
from .rotation import Angles, Layout, angles
from .rows import Run


@dataclass
class Segment:
    """Consecutive queries [start, stop) of a run that share their frequencies and bands.

    Args:
        length: tokens that the frequencies and bands are for; None for a scaler that does not look.
        first: position of the run's key 0.
        offset: index among the run's keys of its query 0.
    """

    scaler: Scaler
    start: int
    stop: int
    length: int | None
    first: int
    offset: int
    bands: tuple[Band, ...]
    frequencies: Frequencies
    temperature: Tensor | None
    _angles: dict[object, Angles] = field(default_factory=dict, repr=False)
    _turns: dict[int, bool] = field(default_factory=dict, repr=False)

    @cached_property
    def blocks(self) -> list[Block]:
        """The rectangles of every band; queries and keys counted as the run's keys are."""
        return list(blocks(self.bands, self.first, self.offset + self.start, self.offset + self.stop))

    @cached_property
    def used_bands(self) -> list[int]:
        """Bands that any query of the segment sees keys of."""
        return sorted({piece.band for block in self.blocks for piece in block.pieces})

    def key_range(self, band: int) -> tuple[int, int]:
        """Keys that bands with this one's key map see, [start, stop)."""
        shared = self.key_map(band)
        pieces = [p for block in self.blocks for p in block.pieces if self.key_map(p.band) == shared]
        return min(p.key_start for p in pieces), max(p.key_stop for p in pieces)

    def key_map(self, band: int) -> int:
        """The first band with the same key map: they share turned keys."""
        return next(i for i, other in enumerate(self.bands) if other.key is self.bands[band].key)

    def query_angles(self, like: Tensor) -> Angles:
        """Angles of all queries in every used band, [bands, 1, 1, n, d/2]. The factor on cos and sin of both sides is
        in them."""
        key = ("queries", like.dtype)
        if key not in self._angles:
            i = torch.arange(self.start, self.stop) + self.offset + self.first
            positions = torch.stack([self.bands[band].query(i) for band in self.used_bands])[:, None, None]
            factor = self.frequencies.attention_factor**2
            self._angles[key] = angles(positions, self.frequencies.inv_freq, factor=factor, like=like)
        return self._angles[key]

    def key_angles(self, band: int, start: int, stop: int, like: Tensor) -> Angles:
        """Angles of the keys [start, stop) in `band`, [n, d/2]."""
        key = (band, start, stop, like.dtype)
        if key not in self._angles:
            positions = self.bands[band].key(torch.arange(start, stop) + self.first)
            self._angles[key] = angles(positions, self.frequencies.inv_freq, like=like)
        return self._angles[key]

    def turns(self, band: int) -> bool:
        """False where all keys of `band` stand at position 0, so that they are read as they are held."""
        if band not in self._turns:
            self._turns[band] = bool(self.bands[band].key(torch.arange(*self.key_range(band)) + self.first).any())
        return self._turns[band]


@dataclass
class Plan:
    """What a scaler does to the layers of one rotary site.

    Args:
        length: tokens that a scaler which depends on length is fixed to; None lets it grow with each sequence.
    """

    site: RotarySite
    scaler: Scaler
    length: int | None = None

    def segments(self, run: Run) -> list[Segment]:
        """The queries of a run, cut where a growing length steps on."""
        effective, rope = self.site.effective(self.scaler), self.site.configured.rope
        offset = run.key_stop - run.key_start - (run.query_stop - run.query_start)
        position, end = run.first + offset, run.first + run.key_stop - run.key_start
        found = []
        while position < end:
            length, stop = self.length, end
            if length is None and effective.depends_on_length:
                length = effective.growing_length(position, rope)
                stop = min(end, length)
            start = position - run.first - offset
            queries = torch.arange(position, stop)
            tempered = self.scaler.member("temperature") is not None
            found.append(
                Segment(
                    scaler=self.scaler,
                    start=start,
                    stop=start + stop - position,
                    length=length,
                    first=run.first,
                    offset=offset,
                    bands=self.site.bands(self.scaler, length),
                    frequencies=effective.frequencies(rope, length),
                    temperature=self.site.logit_factor(self.scaler, queries) if tempered else None,
                )
            )
            position = stop
        return found


def banded_attention(
    q_BHND: Tensor,
    k_BKMD: Tensor,
    v_BKMD: Tensor,
    score: Score,
    layout: Layout | None,
    work: list[tuple[Run, list[Segment]]],
    sinks_H: Tensor | None = None,
    turned: TurnedKeys | None = None,
) -> Tensor:
    """Attention of un-rotated queries over un-rotated keys.

    Args:
        layout: where the rotary pairs lie; None for layers without rotation.
        work: the runs of the batch with their segments.
        sinks_H: the model's own attention sinks, a logit per head that takes weight and gives nothing.
        turned: where turned keys are kept from call to call.

    Returns:
        [B, H, N, Dv]; zeros for padding.
    """
    B, H, N, _ = q_BHND.shape
    rows = []
    for run, segments in work:
        q = _part(q_BHND, run.row, run.query_start, run.query_stop)
        k, v = (_part(t, run.row, run.key_start, run.key_stop) for t in (k_BKMD, v_BKMD))
        keep = turned if run.row is None and run.key_start == 0 else None
        parts = [
            _segment(q, k, v, score, layout, segment, sinks_H, keep if segment is segments[-1] else None)
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
    score: Score,
    layout: Layout | None,
    segment: Segment,
    sinks: Tensor | None,
    turned: TurnedKeys | None,
) -> Tensor:
    q = _part(q, None, segment.start, segment.stop)
    if segment.temperature is not None:
        q = (q * segment.temperature.to(q.device)[:, None]).to(q.dtype)
    queries, keys = dict.fromkeys(segment.used_bands, q), dict.fromkeys(segment.used_bands, (k, 0))
    if layout is not None:
        queries = dict(zip(segment.used_bands, layout.rotate(q, segment.query_angles(q)), strict=True))
        maps = {segment.key_map(band) for band in segment.used_bands}
        turned_keys = {key_map: _turned_keys(k, layout, segment, key_map, turned) for key_map in maps}
        keys = {band: turned_keys[segment.key_map(band)] for band in segment.used_bands}

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


def _turned_keys(
    k: Tensor, layout: Layout, segment: Segment, band: int, turned: TurnedKeys | None
) -> tuple[Tensor, int]:
    """Keys as `band` sees them, and the index of the first of them."""

    start, stop = segment.key_range(band)
    if not segment.turns(band):
        return k, 0

    def turn(start: int, stop: int) -> Tensor:
        return layout.rotate(k[:, :, start:stop], segment.key_angles(band, start, stop, k))

    if turned is None:
        return turn(start, stop), start
    return turned.get((segment.scaler, segment.length, segment.first), band, k[:, :, :stop], turn), 0


def _block(
    queries: dict[int, Tensor],
    keys: dict[int, tuple[Tensor, int]],
    v: Tensor,
    score: Score,
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
