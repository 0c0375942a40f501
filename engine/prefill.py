"""Running a text through the model on top of a cache, in chunks: a prompt to continue, or tokens to score."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..errors import OutOfMemory
from .cache import CacheLost, restoring, tokens_read
from .hf_model import input_device
from .runners.runner import Runner

_SMALLEST = 64  # tokens of the smallest chunk that is tried
LOGITS_BUDGET = 2**24  # most float32 logits held at once: 64 MiB, and on a GPU 512
_ROWS = 64  # rows of logits that are normalised at a time

Progress = Callable[[int, int], None]
"""Called with (tokens in the cache before the step, tokens of the step) after each forward."""


def prefill(
    runner: Runner, ids: Sequence[int], cache: Cache, progress: Progress | None = None, *, logits_to_keep: int = 1
) -> Tensor:
    """Run a prompt in chunks. A chunk that does not fit into memory is halved.

    Returns:
        The logits after its last `logits_to_keep` tokens, [logits_to_keep, V].

    Raises:
        OutOfMemory: not even a small chunk fits. The cache holds the chunks before it.
    """
    assert 1 <= logits_to_keep <= len(ids), (logits_to_keep, len(ids))
    start, size, held, first_logits = 0, runner.chunk, tokens_read(cache), len(ids) - logits_to_keep
    parts: list[Tensor] = []
    while start < len(ids):
        stop = min(start + size, len(ids))
        if start < first_logits < stop < len(ids):
            stop = first_logits  # the logits to return come from one step
        count = stop - max(start, first_logits)
        try:
            with restoring(cache):
                logits = runner.forward(ids[start:stop], cache, logits_to_keep=max(1, count))
        except OutOfMemory as error:
            if stop - start < 2 * _SMALLEST or isinstance(error, CacheLost):
                raise
            size = (stop - start) // 2
            continue
        if count > 0:
            parts.append(logits)
        if progress:
            progress(held + start, stop - start)
        start = stop
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def score(runner: Runner, ids: Sequence[int], first: int, cache: Cache, progress: Progress | None = None) -> Tensor:
    """Log-probabilities of `ids[first:]`, each given all tokens before it.

    Args:
        ids: one sequence.
        first: index of the first token scored, at least 1 (nothing comes before token 0).
        cache: an empty one. Afterwards it holds all tokens but the last.
        progress: called after each forward.

    Returns:
        float32 [len(ids) - first], nats.
    """
    targets = torch.tensor(ids[first:], device=input_device(runner.hf))
    logprobs: list[Tensor] = []
    done = 0
    for logits in scored_logits(runner, ids, first, cache, progress):
        chosen = logits.gather(-1, targets[done : done + len(logits), None])[:, 0]
        logprobs.append(chosen - torch.cat([rows.logsumexp(-1) for rows in torch.split(logits, _ROWS)]))
        done += len(logits)
        del logits  # frees them before the next ones are made
    return torch.cat(logprobs)


def most_scored(runner: Runner) -> int:
    """The most tokens whose logits are held at once."""
    vocabulary: int = runner.hf.config.get_text_config().vocab_size
    return min(runner.chunk, max(1, LOGITS_BUDGET * runner.chunk_factor // vocabulary))


def scored_logits(
    runner: Runner,
    ids: Sequence[int],
    first: int,
    cache: Cache,
    progress: Progress | None = None,
) -> Iterator[Tensor]:
    """The logits that predict `ids[first:]`, float32 [tokens, V], some tokens at a time and in order.

    The tokens run in chunks. The output layer is applied to the scored positions only.

    Args:
        ids, first, cache, progress: as for `score`.
    """
    scored_chunk = most_scored(runner)
    start, end = 0, len(ids) - 1  # token t is predicted at position t - 1, so the last token is not run
    while start < end:
        is_scored = start >= first - 1
        stop = min(start + scored_chunk, end) if is_scored else min(start + runner.chunk, first - 1)
        logits = prefill(runner, ids[start:stop], cache, logits_to_keep=stop - start if is_scored else 1)
        if progress:
            progress(start, stop - start)
        if is_scored:
            yield logits.float()
        del logits
        start = stop
