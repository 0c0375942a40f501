"""Running a prompt through the model on top of a cache, in chunks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..errors import OutOfMemory
from .cache import tokens_read
from .memory import CacheLost, restoring
from .runners.runner import CHUNK, Runner

_SMALLEST = 64  # tokens of the smallest chunk that is tried

Progress = Callable[[int, int], None]
"""Called with (tokens in the cache before the step, tokens of the step) after each forward."""


def prefill(
    runner: Runner, ids: Sequence[int], cache: Cache, progress: Progress | None = None, *, logits_to_keep: int = 1
) -> Tensor:
    """Run a prompt in chunks, smaller ones where a chunk does not fit into memory.

    Returns:
        The logits after its last `logits_to_keep` tokens, [logits_to_keep, V].

    Raises:
        OutOfMemory: not even a few tokens fit. The cache holds what was read before.
    """
    assert 1 <= logits_to_keep <= len(ids), (logits_to_keep, len(ids))
    start, size, held, first_kept = 0, CHUNK, tokens_read(cache), len(ids) - logits_to_keep
    kept: list[Tensor] = []
    while start < len(ids):
        stop = min(start + size, len(ids))
        if start < first_kept < stop < len(ids):
            stop = first_kept  # the logits to keep come from one step
        count = stop - max(start, first_kept)
        try:
            with restoring(cache):
                logits = runner.forward(ids[start:stop], cache, logits_to_keep=max(1, count))
        except OutOfMemory as error:
            if stop - start < 2 * _SMALLEST or isinstance(error, CacheLost):
                raise
            size = (stop - start) // 2
            continue
        if count > 0:
            kept.append(logits)
        if progress:
            progress(held + start, stop - start)
        start = stop
    return kept[0] if len(kept) == 1 else torch.cat(kept)
