"""Log-probabilities of given tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .placement import input_device
from .prefill import Progress, prefill
from .runners.runner import CHUNK, Runner

LOGITS_BUDGET = 2**24  # most float32 logits held at once: 64 MiB
_ROWS = 64  # whose probabilities are added up at a time


def score(runner: Runner, ids: Sequence[int], first: int, cache: Cache, progress: Progress | None = None) -> Tensor:
    """Log-probabilities of `ids[first:]`, each given everything before it.

    Args:
        ids: one sequence.
        first: index of the first token scored, at least 1 (nothing comes before token 0).
        cache: an empty one; holds all tokens but the last afterwards.
        progress: called after each forward.

    Returns:
        float32 [len(ids) - first], nats.
    """
    targets = torch.tensor(ids[first:], device=input_device(runner.hf))
    scored: list[Tensor] = []
    done = 0
    for logits in scored_logits(runner, ids, first, cache, progress):
        chosen = logits.gather(-1, targets[done : done + len(logits), None])[:, 0]
        scored.append(chosen - torch.cat([rows.logsumexp(-1) for rows in torch.split(logits, _ROWS)]))
        done += len(logits)
        del logits  # before the next ones are made
    return torch.cat(scored)


def scored_logits(
    runner: Runner,
    ids: Sequence[int],
    first: int,
    cache: Cache,
    progress: Progress | None = None,
) -> Iterator[Tensor]:
    """The logits that predict `ids[first:]`, float32 [tokens, V], some tokens at a time and in order.

    The prompt runs in chunks; the head is applied in the same chunks, to the scored positions only.

    Args:
        ids, first, cache, progress: as for `score`.
    """
    vocabulary = runner.hf.config.get_text_config().vocab_size
    scored_chunk = min(CHUNK, max(1, LOGITS_BUDGET // vocabulary))
    start, end = 0, len(ids) - 1  # token t is predicted at position t - 1; the last token is never fed
    while start < end:
        inside = start >= first - 1
        stop = min(start + scored_chunk, end) if inside else min(start + CHUNK, first - 1)
        logits = prefill(runner, ids[start:stop], cache, logits_to_keep=stop - start if inside else 1)
        if progress:
            progress(start, stop - start)
        if inside:
            yield logits.float()
        del logits
        start = stop
