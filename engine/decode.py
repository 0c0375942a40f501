"""The decode loop: token ids in, token ids out. Text is the business of `api`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .cache import rewind, tokens_read
from .placement import input_device
from .prefill import prefill
from .runners.runner import Runner
from .sampling import SamplingParams, SeenTokens, random_source, sample
from .token_healing import Continuation, Covers, FirstToken, draw_first_token

Weigh = Callable[[Cache], Covers]
"""Runs a prompt on top of a cache and weighs its covers."""


@dataclass(frozen=True, kw_only=True)
class Token:
    """One decoded token.

    `logprob` and `top` (id -> log-probability) are set if asked for, `source` where the answer is over contexts: the
    index of the one that the token relied on.
    """

    id: int
    logprob: float | None = None
    top: dict[int, float] | None = None
    source: int | None = None


@dataclass(frozen=True, kw_only=True)
class HealedToken(Token):
    """The first token after a prompt whose covers were weighed; it may begin inside the prompt."""

    continuation: Continuation


class Decoding:
    """One answer in the making: it says which tokens to run next, and draws from what they give.

    Args:
        prompt: token ids.
        stop_ids: tokens that end the text.
        cache: may hold the prompt's beginning already; it is written to.
        weigh: draws the first token from the covers of the prompt, as an `OpeningToken`. Without it the answer
            begins where the prompt's tokens end.
    """

    def __init__(
        self,
        runner: Runner,
        prompt: list[int],
        params: SamplingParams,
        stop_ids: frozenset[int],
        cache: Cache | None = None,
        weigh: Weigh | None = None,
    ) -> None:
        self._runner, self._prompt, self._params = runner, prompt, params
        self._stop_ids, self._weigh = stop_ids, weigh
        self._generator = random_source(params, input_device(runner.hf))
        self._count = 0
        self._seen = SeenTokens(params.repetition_penalty)
        self.cache = cache if cache is not None else runner.new_cache(len(prompt) + params.max_new_tokens)
        self.pending: list[int] = []
        self.finished = False

    def open(self) -> Token:
        """Read the prompt and draw the first token."""
        if self._weigh is not None:
            covers = self._weigh(self.cache)
            opening = draw_first_token(covers, self.cache, self._params, self._generator)
            self._seen.read(opening.continuation.prompt_ids)
            return self._next(healed_token(opening, covers, self._params), opening.pending)
        held = tokens_read(self.cache)
        if held >= len(self._prompt):  # the last token must be run to see what follows it
            rewind(self.cache, held - len(self._prompt) + 1)
        self._seen.read(self._prompt)
        rest = self._prompt[tokens_read(self.cache) :]
        return self.draw(prefill(self._runner, rest, self.cache)[-1])

    def draw(self, logits_V: Tensor) -> Token:
        """The token after `pending`, whose logits these are."""
        token = draw_token(self._runner.readable(logits_V).float(), self._seen, self._params, self._generator)
        return self._next(token, [token.id])

    def _next(self, token: Token, pending: list[int]) -> Token:
        self.pending = pending
        self._seen.read([token.id])
        self._count += 1
        self.finished = token.id in self._stop_ids or self._count == self._params.max_new_tokens
        return token


def decode(
    runner: Runner,
    prompt: list[int],
    params: SamplingParams,
    stop_ids: frozenset[int],
    cache: Cache | None = None,
    weigh: Weigh | None = None,
) -> Iterator[Token]:
    """Tokens that follow `prompt`, up to `max_new_tokens` or through one of `stop_ids`. Arguments as of `Decoding`."""
    decoding = Decoding(runner, prompt, params, stop_ids, cache, weigh)
    yield decoding.open()
    while not decoding.finished:
        yield decoding.draw(runner.forward(decoding.pending, decoding.cache, logits_to_keep=1)[0])


def draw_token(logits_V: Tensor, seen: SeenTokens, params: SamplingParams, generator: torch.Generator) -> Token:
    """A token from float32 logits.

    Args:
        seen: tokens that the repetition penalty is for.
    """
    token = sample(seen.penalized(logits_V), params, generator)
    if params.logprobs is None:
        return Token(id=token)
    logprobs = logits_V.log_softmax(-1)
    top = logprobs.topk(min(params.logprobs, len(logprobs)))
    return Token(
        id=token,
        logprob=float(logprobs[token]),
        top={
            index: value
            for index, value in zip(top.indices.tolist(), top.values.tolist(), strict=True)
            if value > -math.inf
        },
    )


def healed_token(opening: FirstToken, covers: Covers, params: SamplingParams) -> HealedToken:
    """The first token of an answer, as it was drawn from the covers of its prompt."""
    if params.logprobs is None:
        return HealedToken(id=opening.token, continuation=opening.continuation)
    logprobs = covers.logprobs - covers.total
    best = logprobs.topk(min(params.logprobs, len(logprobs)))
    top: dict[int, float] = {}
    for index, logprob in zip(best.indices, best.values.tolist(), strict=True):
        if logprob > -math.inf:
            top.setdefault(int(covers.tokens[index]), logprob)  # a token may end covers of two nodes
    return HealedToken(
        id=opening.token, logprob=float(logprobs[opening.index]), top=top, continuation=opening.continuation
    )
