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

_SMALLEST = 64  # tokens of a step that are tried before memory is said to be too small

Progress = Callable[[int, int], None]
"""Called with (tokens in the cache before the step, tokens of the step) after each forward."""


def prefill(
    runner: Runner, ids: Sequence[int], cache: Cache, progress: Progress | None = None, *, logits_to_keep: int = 1
) -> Tensor:
    """Run a prompt in chunks; returns the logits after its last `logits_to_keep` tokens, [logits_to_keep, V].

    Raises:
        OutOfMemory: as `forward`.
    """
    assert 1 <= logits_to_keep <= len(ids), (logits_to_keep, len(ids))
    start, held = 0, tokens_read(cache)
    while len(ids) - start > CHUNK:
        stop = min(start + CHUNK, len(ids) - logits_to_keep)  # the logits that are kept come from one step
        forward(runner, ids[start:stop], cache, logits_to_keep=1)
        if progress:
            progress(held + start, stop - start)
        start = stop
    logits = forward(runner, ids[start:], cache, logits_to_keep=logits_to_keep)
    if progress:
        progress(held + start, len(ids) - start)
    return logits


def forward(runner: Runner, ids: Sequence[int], cache: Cache, *, logits_to_keep: int) -> Tensor:
    """`runner.forward`, in halves where it does not fit into memory as a whole.

    Raises:
        OutOfMemory: not even a few tokens fit. The cache holds what was read before.
    """
    try:
        with restoring(cache):
            return runner.forward(ids, cache, logits_to_keep=logits_to_keep)
    except OutOfMemory as error:
        if len(ids) < 2 * _SMALLEST or isinstance(error, CacheLost):
            raise
    half = len(ids) // 2
    later = min(logits_to_keep, len(ids) - half)
    first = forward(runner, ids[:half], cache, logits_to_keep=max(1, logits_to_keep - later))
    second = forward(runner, ids[half:], cache, logits_to_keep=later)
    return second if later == logits_to_keep else torch.cat([first, second])
