"""Which queries and keys of a batch belong together: padding, packing and positions made explicit.

transformers describes a batch by a mask and position ids. Here it becomes a list of runs: the last n of m
consecutive keys, causal, at consecutive positions. A run is computed as though it were alone, so that no row
can depend on its neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import PatchError

HIDDEN = -(2**62)
"""Marks a key that no query may see in the tensor that `key_slots` makes."""


@dataclass(frozen=True)
class KeyRun:
    """Queries [query_start, query_stop) of the call, which are the last of the keys [key_start, key_stop).

    `row` is None where all rows of the batch are alike. Key `key_start` is at position `first`.
    """

    row: int | None
    query_start: int
    query_stop: int
    key_start: int
    key_stop: int
    first: int


def key_slots(padding: Tensor | None, batch: int, kv_length: int, kv_offset: int, q_offset: int | Tensor) -> Tensor:
    """A causal mask without its square: [B, 1, 1, M], the place of every key counted from the first query.

    Query n sees the keys at places up to n. Four dimensions, because transformers passes such a mask on untouched.

    Args:
        padding: bool [B, at least kv_offset + M]: True for tokens, False for padding; None where there is none.
    """
    device = padding.device if padding is not None else q_offset.device if isinstance(q_offset, Tensor) else None
    slots = torch.arange(kv_length, device=device) + kv_offset
    places = (slots - q_offset).expand(batch, kv_length)
    if padding is not None:
        missing = kv_length + kv_offset - padding.shape[1]  # a static cache is longer than what was read so far
        known = torch.nn.functional.pad(padding, (0, max(missing, 0)), value=True)[:, kv_offset : kv_offset + kv_length]
        places = places.masked_fill(~known, HIDDEN)
    return places[:, None, None, :]


def key_runs(positions: Tensor, mask: Tensor | None, batch: int, queries: int, keys: int) -> list[KeyRun]:
    """The runs of one attention call.

    Args:
        positions: position ids of the queries, [1 or B, N].
        mask: None where every query n sees the keys 0 .. M - N + n; a tensor of `key_slots`; or a mask of
            transformers' [B or 1, 1, N, M], True or 0 for what is seen.

    Raises:
        PatchError: the mask is not causal, hides keys between others, or positions do not count up by one.
    """
    positions = positions.expand(batch, queries)
    found: list[KeyRun | None]
    if mask is None:
        found = [_row(row, positions[row].tolist(), 0, keys, queries) for row in range(batch)]
    elif mask.dtype == torch.int64:
        places = mask[:, 0, 0].expand(batch, keys)
        found = [_padded_row(row, positions[row].tolist(), places[row]) for row in range(batch)]
    else:
        found = _packed(positions, mask, queries, keys)
    seen = [run for run in found if run is not None]
    alike = {(r.query_start, r.query_stop, r.key_start, r.key_stop, r.first) for r in seen}
    if len(seen) == batch and len(alike) == 1:
        return [KeyRun(None, *alike.pop())]
    return seen


def _row(
    row: int, positions: list[int], key_start: int, key_stop: int, query_stop: int, query_start: int = 0
) -> KeyRun:
    own = positions[query_start:query_stop]
    if own != list(range(own[0], own[0] + len(own))):
        raise PatchError(
            f"the position ids of row {row} do not count up by one ({own[:8]}...), so the positions of its cached keys "
            "cannot be known; leave position_ids out"
        )
    first = own[-1] - (key_stop - key_start - 1)
    if first < 0:
        raise PatchError(
            f"row {row} has {key_stop - key_start} keys and its last position is {own[-1]}: position ids must count "
            "the tokens in the cache too"
        )
    return KeyRun(row, query_start, query_stop, key_start, key_stop, first)


def _padded_row(row: int, positions: list[int], places: Tensor) -> KeyRun | None:
    seen = torch.nonzero((places > HIDDEN) & (places < len(positions)))[:, 0]
    if not len(seen):
        return None
    start, stop = int(seen[0]), int(seen[-1]) + 1
    if stop - start != len(seen):
        raise PatchError(
            f"the attention mask hides tokens between others in row {row}; pad on the left or on the right"
        )
    query_stop = int(places[stop - 1]) + 1
    query_start = max(0, query_stop - len(seen))
    if query_stop <= 0:
        return None
    run = _row(row, positions, start, stop, query_stop, query_start)
    if run.first == start:  # positions that count the padding too: count from the row's first token instead
        return KeyRun(row, query_start, query_stop, start, stop, 0)
    return run


def _packed(positions: Tensor, mask: Tensor, queries: int, keys: int) -> list[KeyRun | None]:
    """Several texts in one row, as position ids that start again say; the mask must agree."""
    found: list[KeyRun | None] = []
    if mask.shape[1] > 1:
        raise PatchError("the attention mask differs from head to head")
    seen = mask if mask.dtype == torch.bool else mask == 0
    for row, own in enumerate(positions.tolist()):
        starts = [n for n in range(queries) if n == 0 or own[n] != own[n - 1] + 1]
        if keys != queries and len(starts) > 1:
            raise PatchError(
                f"packed texts need a call without a cache; row {row} has {keys} keys for {queries} queries"
            )
        expected = torch.zeros(queries, keys, dtype=torch.bool, device=mask.device)
        for start, stop in zip(starts, [*starts[1:], queries], strict=True):
            key_start = 0 if len(starts) == 1 else start
            key_stop = keys - queries + stop
            found.append(_row(row, own, key_start, key_stop, stop, start))
            square = expected[start:stop, key_start:key_stop]
            square |= torch.ones_like(square).tril(key_stop - key_start - (stop - start))
        if not torch.equal(seen[row if seen.shape[0] > 1 else 0, 0], expected):
            raise PatchError(
                f"the attention mask of row {row} is not causal attention over its texts; ropewalk's bands need that, "
                "with padding on the left or on the right at most"
            )
    return found
