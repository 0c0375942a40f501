"""The decode loop: token ids in, token ids out. Text is the business of `api`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .cache import rewind
from .network import Network
from .opening import Continuation, Covers, open_answer
from .prefill import prefill
from .sampling import SamplingParams, penalize_repetition, random_source, sample

Weigh = Callable[[Cache], Covers]
"""Runs a prompt on top of a cache and weighs its covers."""


@dataclass(frozen=True, kw_only=True)
class Token:
    """One decoded token; `logprob` and `top` (id -> log-probability) are set if asked for."""

    id: int
    logprob: float | None = None
    top: dict[int, float] | None = None


@dataclass(frozen=True, kw_only=True)
class OpeningToken(Token):
    """The first token after a prompt whose covers were weighed; it may begin inside the prompt."""

    continuation: Continuation


def decode(
    network: Network,
    prompt: list[int],
    params: SamplingParams,
    stop_ids: frozenset[int],
    cache: Cache | None = None,
    weigh: Weigh | None = None,
) -> Iterator[Token]:
    """Tokens that follow `prompt`, up to `max_new_tokens` or through one of `stop_ids`.

    Args:
        cache: may hold the prompt's beginning already; it is written to.
        weigh: draws the first token from the covers of the prompt, as an `OpeningToken`. Without it the answer
            begins where the prompt's tokens end.
    """
    generator = random_source(params, network.hf.device)
    if cache is None:
        cache = network.new_cache(len(prompt) + params.max_new_tokens)
    if weigh is None:
        if (excess := cache.get_seq_length() - len(prompt) + 1) > 0:
            rewind(cache, excess)  # the last token must be run to see what follows it
        seen = list(prompt)
        logits = prefill(network, prompt[cache.get_seq_length() :], cache)[-1].float()
        token = _draw(logits, seen, params, generator)
        pending = [token.id]
    else:
        token, pending = _open(weigh(cache), cache, params, generator)
        seen = list(token.continuation.prompt_ids)
    count = 0
    while True:
        yield token
        count += 1
        if token.id in stop_ids or count == params.max_new_tokens:
            return
        seen.append(token.id)
        logits = network.forward(pending, cache, keep=1)[0].float()
        token = _draw(logits, seen, params, generator)
        pending = [token.id]


def _draw(logits_V: Tensor, seen: list[int], params: SamplingParams, generator: torch.Generator) -> Token:
    scores = logits_V
    if params.repetition_penalty != 1:
        scores = penalize_repetition(logits_V, torch.tensor(seen, device=logits_V.device), params.repetition_penalty)
    token = sample(scores, params, generator)
    if params.logprobs is None:
        return Token(id=token)
    logprobs = logits_V.log_softmax(-1)
    top = logprobs.topk(params.logprobs)
    return Token(
        id=token,
        logprob=float(logprobs[token]),
        top=dict(zip(top.indices.tolist(), top.values.tolist(), strict=True)),
    )


def _open(
    covers: Covers, cache: Cache, params: SamplingParams, generator: torch.Generator
) -> tuple[OpeningToken, list[int]]:
    opening = open_answer(covers, cache, params, generator)
    if params.logprobs is None:
        return OpeningToken(id=opening.token, continuation=opening.continuation), opening.pending
    logprobs = covers.logprobs - covers.total
    best = logprobs.topk(params.logprobs)
    top: dict[int, float] = {}
    for index, logprob in zip(best.indices, best.values.tolist(), strict=True):
        top.setdefault(int(covers.tokens[index]), logprob)  # a token may end covers of two nodes
    return OpeningToken(
        id=opening.token,
        logprob=float(logprobs[opening.index]),
        top=top,
        continuation=opening.continuation,
    ), opening.pending
