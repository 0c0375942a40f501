"""A call of transformers' continuous batching: tokens of several texts in one row, their keys in the pages of a cache.

The pages hold keys un-rotated, so texts with the same beginning can share them under every scaler.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...errors import PatchError
from ..attention.rows import KeyRun

_WITHOUT_FLASH = (
    'load the model with attn_implementation="sdpa", and give generate_batch continuous_batching_config='
    "ContinuousBatchingConfig(auto_switch_to_flash=False)"
)


def update_pages(module: nn.Module, key: Tensor, value: Tensor, others: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Write the keys and values of a call into the pages of a layer.

    Args:
        others: the other arguments of the attention call. The cache is taken out. What remains describes the result.

    Returns:
        The keys and values of all texts that the tokens see, one text after the other, each [1, K, M, D].

    Raises:
        PatchError: the call reads pages in place, or is recorded in a CUDA graph.
    """
    if others.get("block_table") is not None:
        raise PatchError(f"a position map does not work with block tables; {_WITHOUT_FLASH}")
    if key.is_cuda and torch.cuda.is_current_stream_capturing():
        raise PatchError(f"a position map does not work in CUDA graphs; {_WITHOUT_FLASH}")
    cache = others.pop("cache")
    updated: tuple[Tensor, Tensor] = cache.update(key, value, layer_idx=module.layer_idx, kwargs=others)
    return updated


def is_paged(others: dict[str, Any]) -> bool:
    """True if `update_pages` has prepared the arguments of a call."""
    return others.get("read_index") is not None


def text_runs(positions: Tensor, others: dict[str, Any]) -> list[KeyRun]:
    """The runs of the texts of a call.

    Args:
        positions: position ids of the tokens, [1, N].
        others: as `update_pages` has left it.

    Raises:
        PatchError: the pages do not hold all keys of a text.
    """
    ids = positions[0].tolist()
    starts, key_starts = others["cu_seq_lens_q"].tolist(), others["cu_seq_lens_k"].tolist()
    runs = []
    for start, stop, key_start, key_stop in zip(starts, starts[1:], key_starts, key_starts[1:], strict=False):
        if stop == start:
            continue
        length, held = ids[stop - 1] + 1, key_stop - key_start
        if held != length:
            raise PatchError(
                f"a text has {length} tokens and the cache holds {held} of its keys, because transformers reads a "
                "sliding window from the config that the model does not have; set config.sliding_window to None before "
                "loading"
            )
        runs.append(KeyRun(0, start, stop, key_start, key_stop, 0))
    return runs


def places_in_texts(query: Tensor, key: Tensor, others: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The places of the queries and keys of a call, counted from the first key of each text, with 0 for padding.

    Args:
        others: as `update_pages` has left it.
    """
    query_starts, key_starts = others["cu_seq_lens_q"].long(), others["cu_seq_lens_k"].long()
    first_queries = key_starts.diff() - query_starts.diff()
    return (
        _counted(query_starts, first_queries, query.shape[2]),
        _counted(key_starts, torch.zeros_like(first_queries), key.shape[2]),
    )


def _counted(starts: Tensor, first: Tensor, size: int) -> Tensor:
    """Numbers that count up within each text r, from `first[r]` on."""
    offsets = torch.repeat_interleave(first - starts[:-1], starts.diff())
    counted = offsets + torch.arange(len(offsets), device=starts.device)
    return torch.nn.functional.pad(counted, (0, size - len(counted)))
