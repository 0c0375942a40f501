"""Running a prompt through the model on top of a cache, in chunks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..errors import OutOfMemory
from .cache import tokens_read
from .memory import CacheLost, restoring
from .network import CHUNK, Network

_SMALLEST = 64  # tokens of a step that are tried before memory is said to be too small

Progress = Callable[[int, int], None]
"""Called with (tokens in the cache before the step, tokens of the step) after each forward."""


def prefill(
    network: Network, ids: Sequence[int], cache: Cache, progress: Progress | None = None, *, keep: int = 1
) -> Tensor:
    """Run a prompt in chunks; returns the logits after its last `keep` tokens, [keep, V].

    Raises:
        OutOfMemory: as `forward`.
    """
    assert 1 <= keep <= len(ids), (keep, len(ids))
    start, held = 0, tokens_read(cache)
    while len(ids) - start > CHUNK:
        stop = min(start + CHUNK, len(ids) - keep)  # the logits that are kept come from one step
        forward(network, ids[start:stop], cache, keep=1)
        if progress:
            progress(held + start, stop - start)
        start = stop
    logits = forward(network, ids[start:], cache, keep=keep)
    if progress:
        progress(held + start, len(ids) - start)
    return logits


def forward(network: Network, ids: Sequence[int], cache: Cache, *, keep: int) -> Tensor:
    """`network.forward`, in halves where it does not fit into memory as a whole.

    Raises:
        OutOfMemory: not even a few tokens fit. The cache holds what was read before.
    """
    try:
        with restoring(cache):
            return network.forward(ids, cache, keep=keep)
    except OutOfMemory as error:
        if len(ids) < 2 * _SMALLEST or isinstance(error, CacheLost):
            raise
    half = len(ids) // 2
    later = min(keep, len(ids) - half)
    first = forward(network, ids[:half], cache, keep=max(1, keep - later))
    second = forward(network, ids[half:], cache, keep=later)
    return second if later == keep else torch.cat([first, second])
