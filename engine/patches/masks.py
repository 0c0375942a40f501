"""Which keys a query sees, read from the mask that an attention function is given."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask


def seen_keys(mask: Tensor | BlockMask, keys: int) -> Tensor:
    """Bool [B, N, M], or [B, 1, M] where only the last query's row can be told.

    Args:
        mask: [B, 1, N, M], True or 0 for what is seen; [B, M], True or 1 for tokens; or of flex attention.
        keys: M.
    """
    if isinstance(mask, BlockMask):
        device = mask.kv_num_blocks.device
        batch = torch.arange(mask.shape[0], device=device)[:, None, None]
        head = torch.zeros((), dtype=torch.long, device=device)
        seen: Tensor = mask.mask_mod(batch, head, head + mask.seq_lengths[0] - 1, torch.arange(keys, device=device))
        return seen.expand(mask.shape[0], 1, keys)
    if mask.dim() == 2:
        return mask.bool()[:, None]
    return mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] > torch.finfo(mask.dtype).min / 2


def own_positions(positions: Tensor, mask: Tensor | BlockMask | None, keys: int) -> Tensor:
    """Positions that count a row's tokens and not the padding before them, [1 or B, N].

    A query whose position is the place of its key among all keys counts from the first key that it sees.

    Args:
        positions: position ids of the queries, [1 or B, N].
        mask: as an attention function is given it.
        keys: how many there are.
    """
    if mask is None:
        return positions
    seen = seen_keys(mask, keys)
    rows = max(len(seen), len(positions))
    seen, asked = seen.expand(rows, -1, -1), positions[:, -seen.shape[1] :].expand(rows, -1)
    last = seen.shape[2] - 1
    place = asked.clamp(max=last)
    next_seen = seen.gather(2, (place + 1).clamp(max=last)[..., None])[..., 0] & (place < last)
    counted = (asked == place) & seen.gather(2, place[..., None])[..., 0] & ~next_seen
    before = seen.to(torch.uint8).argmax(2)
    return torch.where(counted, (positions - before).clamp(min=0), positions)
