"""Splits a batch into runs of queries and keys that belong together, by its padding, packing and positions.

transformers describes a batch by a mask and position ids. Here it becomes a list of runs. A run is the last n of m
consecutive keys, causal, at consecutive positions. Each run is computed alone, so no row depends on another.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import PatchError

HIDDEN = -(2**62)
"""In the tensor of `key_slots`: a key that no query may see."""


def counting_up(start: int, count: int, device: torch.device) -> Tensor:
    """Position ids [1, count] that count up from `start`. `key_runs` knows them without a copy from the device."""
    positions = torch.arange(start, start + count, device=device)[None]
    positions.ropewalk_start = start  # type: ignore[attr-defined]
    return positions


@dataclass(frozen=True)
class KeyRun:
    """Queries [query_start, query_stop) of the call, and the keys [key_start, key_stop) that end with theirs.

    `row` is None if all rows of the batch have the same run. Key `key_start` is at position `first`.
    """

    row: int | None
    query_start: int
    query_stop: int
    key_start: int
    key_stop: int
    first: int


def key_slots(padding: Tensor | None, batch: int, kv_length: int, kv_offset: int, q_offset: int | Tensor) -> Tensor:
    """A causal mask in linear memory: [B, 1, 1, M], the place of every key counted from the first query.

    Query n sees the keys at places up to n. The tensor has four dimensions, because transformers passes such a mask on
    unchanged.

    Args:
        padding: bool [B, at least kv_offset + M]: True for tokens, False for padding; None for no padding.
    """
    device = padding.device if padding is not None else q_offset.device if isinstance(q_offset, Tensor) else None
    slots = torch.arange(kv_length, device=device) + kv_offset
    places = (slots - q_offset).expand(batch, kv_length)
    if padding is not None:
        missing = kv_length + kv_offset - padding.shape[1]  # a static cache has room beyond the text
        known = torch.nn.functional.pad(padding, (0, max(missing, 0)), value=True)[:, kv_offset : kv_offset + kv_length]
        places = places.masked_fill(~known, HIDDEN)
    return places[:, None, None, :]


def key_runs(positions: Tensor, mask: Tensor | None, batch: int, queries: int, keys: int) -> list[KeyRun]:
    """The runs of one attention call.

    Args:
        positions: position ids of the queries, [1 or B, N].
        mask: None if every query n sees the keys 0 .. M - N + n; or a tensor of `key_slots`; or a mask from
            transformers [B or 1, 1, N, M], which is True or 0 for visible keys.

    Raises:
        PatchError: the mask is not causal or hides keys in the middle, positions do not count up by one, or keys are
            missing in the cache.
    """
    start: int | None = getattr(positions, "ropewalk_start", None)
    if start is not None:
        known = list(range(start, start + queries))
        positions = torch.tensor(known)  # on the CPU
    positions = positions.expand(batch, queries)
    rows: list[KeyRun | None]
    if mask is None:
        rows = [_row(row, positions[row].tolist(), 0, keys, queries) for row in range(batch)]
    elif mask.dtype == torch.int64:
        places = mask[:, 0, 0].expand(batch, keys)
        rows = [_padded_row(row, positions[row].tolist(), places[row]) for row in range(batch)]
    else:
        rows = _packed(positions, mask, queries, keys)
    runs = [run for run in rows if run is not None]
    distinct = {(r.query_start, r.query_stop, r.key_start, r.key_stop, r.first) for r in runs}
    if len(runs) == batch and len(distinct) == 1:
        return [KeyRun(None, *distinct.pop())]
    return runs


def _row(
    row: int, positions: list[int], key_start: int, key_stop: int, query_stop: int, query_start: int = 0
) -> KeyRun:
    run = positions[query_start:query_stop]
    if run != list(range(run[0], run[0] + len(run))):
        raise PatchError(
            f"the position ids of row {row} do not count up by one ({run[:8]}...), so the positions of its cached keys "
            "are unknown; leave position_ids out"
        )
    first = run[-1] - (key_stop - key_start - 1)
    if first < 0:
        raise PatchError(
            f"row {row} has {key_stop - key_start} keys, but its last position is {run[-1]}; position ids must also "
            "count the tokens in the cache"
        )
    if first not in (0, key_start) and key_stop - key_start > len(run):
        raise PatchError(
            f"row {row} has {key_stop - key_start} keys, and its last position is {run[-1]}: its cache has dropped "
            "keys, or its text does not begin at position 0. This scaler needs the positions of all keys; use a cache "
            "that keeps them, or positions from 0"
        )
    return KeyRun(row, query_start, query_stop, key_start, key_stop, first)


def _padded_row(row: int, positions: list[int], places: Tensor) -> KeyRun | None:
    seen = torch.nonzero((places > HIDDEN) & (places < len(positions)))[:, 0]
    if not len(seen):
        return None
    start, stop = int(seen[0]), int(seen[-1]) + 1
    if stop - start != len(seen):
        raise PatchError(
            f"the attention mask of row {row} hides tokens in the middle of the text; pad on the left or on the right"
        )
    query_stop = int(places[stop - 1]) + 1
    query_start = max(0, query_stop - len(seen))
    if query_stop <= 0:
        return None
    run = _row(row, positions, start, stop, query_stop, query_start)
    if run.first == start:  # these positions count the padding; count from the row's first token instead
        return KeyRun(row, query_start, query_stop, start, stop, 0)
    return run


def _packed(positions: Tensor, mask: Tensor, queries: int, keys: int) -> list[KeyRun | None]:
    """Several texts in one row. Each starts where the position ids start again, and the mask must agree."""
    runs: list[KeyRun | None] = []
    if mask.shape[1] > 1:
        raise PatchError("the attention mask differs from head to head")
    seen = mask if mask.dtype == torch.bool else mask == 0
    for row, ids in enumerate(positions.tolist()):
        starts = [n for n in range(queries) if n == 0 or ids[n] != ids[n - 1] + 1]
        if keys != queries and len(starts) > 1:
            raise PatchError(
                f"row {row} holds several packed texts and has {keys} keys for {queries} queries; packed texts need a "
                "call without a cache"
            )
        expected = torch.zeros(queries, keys, dtype=torch.bool, device=mask.device)
        for start, stop in zip(starts, [*starts[1:], queries], strict=True):
            key_start = 0 if len(starts) == 1 else start
            key_stop = keys - queries + stop
            runs.append(_row(row, ids, key_start, key_stop, stop, start))
            square = expected[start:stop, key_start:key_stop]
            square |= torch.ones_like(square).tril(key_stop - key_start - (stop - start))
        if not torch.equal(seen[row if seen.shape[0] > 1 else 0, 0], expected):
            raise PatchError(
                f"the attention mask of row {row} is not causal over its texts; this scaler needs a causal "
                "mask, with padding on the left or on the right only"
            )
    return runs


def first_seen(window: int | None, queries: int, length: int) -> int:
    """The first key that the last `queries` of `length` tokens of a text see; None is no window."""
    return 0 if window is None else max(0, length - queries - window + 1)
