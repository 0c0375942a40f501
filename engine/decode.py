"""The decode loop: token ids in, token ids out. Text is the business of `api`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from .cache import new_cache
from .sampling import SamplingParams, penalize_repetition, sample

CHUNK = 1024  # tokens a prefill step: 8k tokens of a 135M model take 41, 39, 38, 38 s at 256, 512, 1024, 2048
LOGITS_BUDGET = 2**25  # most float32 logits held at once: 128 MiB

Progress = Callable[[int, int], None]
"""Called with (tokens in the cache before the step, tokens of the step) after each forward."""


@dataclass(frozen=True, kw_only=True)
class Token:
    """One decoded token; `logprob` and `top` (id -> log-probability) are set if asked for."""

    id: int
    logprob: float | None = None
    top: dict[int, float] | None = None


def forward(hf: PreTrainedModel, ids: list[int], cache: Cache, keep: int) -> Tensor:
    """Run `ids` on top of `cache` and return the last `keep` logits, [keep, V] in the model's dtype."""
    batch = torch.tensor([ids], device=hf.device)
    logits: Tensor = hf(input_ids=batch, past_key_values=cache, use_cache=True, logits_to_keep=keep).logits
    return logits[0, -keep:]


def prefill(hf: PreTrainedModel, ids: list[int], cache: Cache, progress: Progress | None = None) -> Tensor:
    """Run a prompt in chunks; returns the logits after its last token, [V]."""
    logits = torch.empty(0)
    for start in range(0, len(ids), CHUNK):
        chunk = ids[start : start + CHUNK]
        logits = forward(hf, chunk, cache, keep=1)
        if progress:
            progress(start, len(chunk))
    return logits[-1]


def decode(
    hf: PreTrainedModel,
    prompt: list[int],
    params: SamplingParams,
    stop_ids: frozenset[int],
    cache: Cache | None = None,
) -> Iterator[Token]:
    """Tokens that follow `prompt`, up to `max_new_tokens` or through one of `stop_ids`.

    `cache` may hold the prompt's beginning already, all but its last token at most; it is written to.
    """
    generator = torch.Generator(device=hf.device)
    if params.seed is None:
        generator.seed()
    else:
        generator.manual_seed(params.seed)
    if cache is None:
        cache = new_cache(hf.config, capacity=len(prompt) + params.max_new_tokens)
    assert cache.get_seq_length() < len(prompt), "the last token of a prompt must be run to see what follows it"
    seen = list(prompt)
    logits = prefill(hf, prompt[cache.get_seq_length() :], cache).float()
    for step in range(params.max_new_tokens):
        scores = logits
        if params.repetition_penalty != 1:
            scores = penalize_repetition(logits, torch.tensor(seen, device=logits.device), params.repetition_penalty)
        token = sample(scores, params, generator)
        seen.append(token)
        yield _with_logprobs(token, logits, params.logprobs)
        if token in stop_ids or step + 1 == params.max_new_tokens:
            return
        logits = forward(hf, [token], cache, keep=1)[0].float()


def _with_logprobs(token: int, logits_V: Tensor, count: int | None) -> Token:
    if count is None:
        return Token(id=token)
    logprobs = logits_V.log_softmax(-1)
    top = logprobs.topk(count)
    return Token(
        id=token,
        logprob=float(logprobs[token]),
        top=dict(zip(top.indices.tolist(), top.values.tolist(), strict=True)),
    )


def score(hf: PreTrainedModel, ids: list[int], first: int, cache: Cache, progress: Progress | None = None) -> Tensor:
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
    scored_chunk = min(CHUNK, max(1, LOGITS_BUDGET // hf.config.get_text_config().vocab_size))
    targets = torch.tensor(ids[1:], device=hf.device)
    scored: list[Tensor] = []
    start, end = 0, len(ids) - 1  # token t is predicted at position t - 1; the last token is never fed
    while start < end:
        inside = start >= first - 1
        stop = min(start + scored_chunk, end) if inside else min(start + CHUNK, first - 1)
        logits = forward(hf, ids[start:stop], cache, keep=stop - start if inside else 1)
        if inside:
            logits = logits.float()
            chosen = logits.gather(-1, targets[start:stop, None])[:, 0]
            scored.append(chosen - logits.logsumexp(-1))
        if progress:
            progress(start, stop - start)
        start = stop
    return torch.cat(scored)
