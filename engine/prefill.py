"""Running a prompt through the model on top of a cache, in chunks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..errors import ContextOverflow
from .cache import can_rewind, tokens_read
from .network import CHUNK, Network

_SMALLEST = 64  # tokens of a step that are tried before memory is said to be too small

Progress = Callable[[int, int], None]
"""Called with (tokens in the cache before the step, tokens of the step) after each forward."""


def prefill(
    network: Network, ids: Sequence[int], cache: Cache, progress: Progress | None = None, *, keep: int = 1
) -> Tensor:
    """Run a prompt in chunks; returns the logits after its last `keep` tokens, [keep, V].

    Raises:
        ContextOverflow: as `forward`.
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
        ContextOverflow: not even a few tokens fit. The cache holds what was read before.
    """
    held = tokens_read(cache)
    try:
        return network.forward(ids, cache, keep=keep)
    except (MemoryError, RuntimeError) as error:
        excess = [tokens_read(layer) - held for layer in cache.layers]  # some layers may have the tokens already
        if not _is_lack_of_memory(error) or not can_rewind(cache, max(excess, default=0)):
            raise
        for layer, count in zip(cache.layers, excess, strict=True):
            layer.crop(-count)
        if len(ids) < 2 * _SMALLEST:
            raise ContextOverflow(
                f"out of memory after {held} tokens, even for {len(ids)} at a time; shorten the text, load with a "
                "smaller dtype or kv_dtype, or end what else takes memory"
            ) from error
    half = len(ids) // 2
    later = min(keep, len(ids) - half)
    first = forward(network, ids[:half], cache, keep=max(1, keep - later))
    second = forward(network, ids[half:], cache, keep=later)
    return second if later == keep else torch.cat([first, second])


def _is_lack_of_memory(error: Exception) -> bool:
    """Also torch's on the CPU, which has no class of its own."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)
