"""Log-probabilities of given tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .network import Network
from .prefill import CHUNK, Progress

LOGITS_BUDGET = 2**25  # most float32 logits held at once: 128 MiB


def score(network: Network, ids: Sequence[int], first: int, cache: Cache, progress: Progress | None = None) -> Tensor:
    """Log-probabilities of `ids[first:]`, each given everything before it.

    The prompt runs in chunks; the head is applied in the same chunks, to the scored positions only.

    Args:
        ids: one sequence.
        first: index of the first token scored, at least 1 (nothing comes before token 0).
        cache: an empty one; holds all tokens but the last afterwards.
        progress: called after each forward.

    Returns:
        float32 [len(ids) - first], nats.
    """
    assert 1 <= first < len(ids), (first, len(ids))
    scored_chunk = min(CHUNK, max(1, LOGITS_BUDGET // network.hf.config.get_text_config().vocab_size))
    targets = torch.tensor(ids[1:], device=network.hf.device)
    scored: list[Tensor] = []
    start, end = 0, len(ids) - 1  # token t is predicted at position t - 1; the last token is never fed
    while start < end:
        inside = start >= first - 1
        stop = min(start + scored_chunk, end) if inside else min(start + CHUNK, first - 1)
        logits = network.forward(ids[start:stop], cache, keep=stop - start if inside else 1)
        if inside:
            logits = logits.float()
            chosen = logits.gather(-1, targets[start:stop, None])[:, 0]
            scored.append(chosen - logits.logsumexp(-1))
        if progress:
            progress(start, stop - start)
        start = stop
    return torch.cat(scored)
