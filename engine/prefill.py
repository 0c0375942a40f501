"""Running a text through the model on top of a cache, in chunks: a prompt to continue, or tokens to score."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..errors import OutOfMemory
from .cache import CacheLost, restoring, tokens_read
from .hf_model import input_device
from .runners.runner import CHUNK, Runner

_SMALLEST = 64  # tokens of the smallest chunk that is tried
LOGITS_BUDGET = 2**24  # most float32 logits held at once: 64 MiB
_ROWS = 64  # whose probabilities are added up at a time

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
