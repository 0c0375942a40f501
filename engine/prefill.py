"""Running a prompt through the model on top of a cache, in chunks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from transformers.cache_utils import Cache

from .cache import tokens_read
from .network import CHUNK, Network

Progress = Callable[[int, int], None]
"""Called with (tokens in the cache before the step, tokens of the step) after each forward."""


def prefill(
    network: Network, ids: Sequence[int], cache: Cache, progress: Progress | None = None, *, keep: int = 1
) -> Tensor:
    """Run a prompt in chunks; returns the logits after its last `keep` tokens, [keep, V]."""
    assert 1 <= keep <= len(ids), (keep, len(ids))
    start, held = 0, tokens_read(cache)
    while len(ids) - start > CHUNK:
        stop = min(start + CHUNK, len(ids) - keep)  # the logits that are kept come from one step
        network.forward(ids[start:stop], cache, keep=1)
        if progress:
            progress(held + start, stop - start)
        start = stop
    logits = network.forward(ids[start:], cache, keep=keep)
    if progress:
        progress(held + start, len(ids) - start)
    return logits
