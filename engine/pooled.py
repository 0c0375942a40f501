"""One answer over many contexts: a row for each, and a token that all of them take."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING
from weakref import WeakSet

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..errors import ConfigError, ContextOverflow, OutOfMemory
from .answer import Answer
from .cache import tokens_read
from .completion import Completion, Usage
from .decode import Token, draw_token, healed_token
from .generation import check_length, refuse_change
from .kv_cache import KVCache
from .memory import restoring
from .nbce import NBCE
from .placement import input_device
from .prefill import prefill
from .prefix_cache import PrefixCache
from .prompt import Prompt
from .sampling import SamplingParams, SeenTokens, random_source
from .token_healing import draw_first_token, first_token_at, weigh

if TYPE_CHECKING:
    from .model import Model


class ContextCaches:
    """The caches of the rows of the question that ended last, for the next one."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._cached: list[PrefixCache] = []
        self._lent: WeakSet[PrefixCache] = WeakSet()

    @contextlib.contextmanager
    def lent(self, rows: Sequence[Prompt]) -> Iterator[list[PrefixCache]]:
        """A cache for each row, the block's alone; afterwards they are kept in the place of what came back before."""
        taken = self._take(rows)
        self._lent.update(taken)
        try:
            yield taken
        finally:
            if all(cached in self._lent for cached in taken):  # else `clear` was called meanwhile
                self._cached = taken

    def _take(self, rows: Sequence[Prompt]) -> list[PrefixCache]:
        """The caches that hold most of the rows' beginnings, or empty ones. Those not taken are dropped."""
        with self._model.lock:
            free, self._cached = self._cached, []
        taken = []
        for row in rows:
            best = max(free, key=lambda cached: cached.shared(row.certain), default=None)
            if best is None or not best.shared(row.certain):
                best = PrefixCache(self._model)
            else:
                free = [cached for cached in free if cached is not best]
            taken.append(best)
        return taken

    def clear(self) -> None:
        """Give the memory back; what is lent is not kept either."""
        self._cached, self._lent = [], WeakSet()


class PooledAnswer:
    """An answer to a question over contexts, as it is written.

    Args:
        caches: what was read for earlier questions.

    Raises:
        ConfigError: there are no contexts, or one is blank.
        ContextOverflow: a context with the question is longer than the scaler reaches.
    """

    def __init__(
        self,
        model: Model,
        question: str,
        contexts: Sequence[str],
        nbce: NBCE,
        params: SamplingParams,
        caches: ContextCaches,
    ) -> None:
        _check(question, contexts)
        self._model, self._nbce, self._params = model, nbce, params
        self._rows = _read(model, nbce.rows(question, list(contexts)), params)
        self._length = _longest(model, self._rows, params)
        self._caches = caches
        self._prompts = [row.ids for row in self._rows]
        self._seen = SeenTokens(params.repetition_penalty)
        self._answer = Answer(self._rows[0], params, model.vocabulary, model.stop_ids)

    @property
    def tokens(self) -> list[Token]:
        """Those written so far; their `source` is the context that each relied on."""
        return self._answer.tokens

    def completion(self) -> Completion:
        """What `generate` returns."""
        found = self._answer.completion()
        read = sum(map(len, self._prompts))
        return replace(found, usage=Usage(prompt_tokens=read, completion_tokens=found.usage.completion_tokens))

    def pieces(self) -> Iterator[str]:
        """The text as it is decided.

        Raises:
            ContextOverflow: all contexts together are more than memory holds.
        """
        with self._caches.lent(self._rows) as cached:
            yield from self._written(cached)

    def _written(self, rows: list[PrefixCache]) -> Iterator[str]:
        model, rope, broken = self._model, self._model.rope, True
        self._check_room(rows)
        generator = random_source(self._params, input_device(model.hf))
        caches = [cached.ready(row.certain, self._length) for cached, row in zip(rows, self._rows, strict=True)]
        pending: list[list[int]] = []
        try:
            while not self._answer.done:
                with model.lock, torch.inference_mode(), restoring(*caches):
                    refuse_change(model, rope)
                    model.prepare(self._length)
                    if pending:
                        logits = model.runner.step(list(zip(pending, caches, strict=True))).float()
                        token = self._draw(logits, generator)
                        pending = [[token.id]] * len(caches)
                    else:
                        token, pending = self._open(caches, generator)
                if piece := self._answer.push(token):
                    yield piece
            broken = False
        except GeneratorExit:  # which comes between two steps
            broken = False
            raise
        finally:
            written = [token.id for token in self._answer.tokens]
            for cached, prompt, row in zip(rows, self._prompts, self._rows, strict=True):
                cached.settle([*prompt, *written] if written else row.certain, broken)

    def _check_room(self, rows: list[PrefixCache]) -> None:
        owned = sum(cached.cache.owned for cached in rows if isinstance(cached.cache, KVCache))
        wanted = [len(row.ids) + self._params.max_new_tokens for row in self._rows]
        with self._model.lock:
            self._model.prepare(self._length)  # how much room a token takes depends on the scaler
            self._model.runner.check_room(*wanted, owned=owned)

    def _open(self, caches: list[Cache], generator: torch.Generator) -> tuple[Token, list[list[int]]]:
        """Read all prompts and draw the first token: among the covers of the question's end, where there are any."""
        runner, params = self._model.runner, self._params
        if self._rows[0].cover is None:
            read = [
                prefill(runner, row.ids[tokens_read(cache) :], cache)[-1]
                for row, cache in zip(self._rows, caches, strict=True)
            ]
            self._seen.read(self._prompts[0])
            token = self._draw(torch.stack(read).float(), generator)
            return token, [[token.id]] * len(caches)
        vocabulary, penalty = self._model.vocabulary, params.repetition_penalty
        weighed = [
            weigh(runner, row.cover, row.start, cache, vocabulary, penalty)
            for row, cache in zip(self._rows, caches, strict=True)
            if row.cover is not None
        ]
        scores, spoken = self._nbce.pool(torch.stack([covers.logprobs - covers.total for covers in weighed]), None)
        penalties = weighed[0].scores - weighed[0].logprobs
        pooled = replace(weighed[0], scores=scores + penalties, logprobs=scores.log_softmax(-1))
        first = draw_first_token(pooled, caches[0], params, generator)
        openings = [
            first,
            *(first_token_at(one, cache, first.index) for one, cache in zip(weighed[1:], caches[1:], strict=True)),
        ]
        self._prompts = [opening.continuation.prompt_ids for opening in openings]
        self._seen.read(self._prompts[0])
        token = replace(healed_token(first, pooled, params), source=_source(spoken, first.index))
        return token, [opening.pending for opening in openings]

    def _draw(self, logits: Tensor, generator: torch.Generator) -> Token:
        """The token that all rows take, from the logits of each, [1 + n, V]."""
        written = self._answer.tokens
        scores, spoken = self._nbce.pool(self._model.runner.readable(logits), written[-1].source if written else None)
        self._seen.read(token.id for token in written[-1:])
        token = draw_token(scores, self._seen, self._params, generator)
        return replace(token, source=_source(spoken, token.id))


def answer_all(questions: Iterable[PooledAnswer]) -> list[Completion]:
    """Write one answer after another.

    Raises:
        OutOfMemory: `finished` holds those before.
    """
    found: dict[int, Completion] = {}
    try:
        for index, answer in enumerate(questions):
            for _ in answer.pieces():
                pass
            found[index] = answer.completion()
    except OutOfMemory as error:
        error.finished = found
        raise
    return list(found.values())


def _check(question: str, contexts: Sequence[str]) -> None:
    if isinstance(contexts, str):
        raise ConfigError(
            "contexts is one string; give a list: [text], or rw.windows(text, tokenizer, ...) of a long one"
        )
    if not contexts:
        raise ConfigError("contexts is empty; give one text at least, or leave it out")
    if blank := [n for n, context in enumerate(contexts) if not context.strip()]:
        raise ConfigError(f"contexts[{blank[0]}] is blank; leave it out (a row without context is always there)")
    if not question.strip():
        raise ConfigError("the prompt is blank; with contexts, it is the question that each of them is asked")


def _read(model: Model, texts: list[str], params: SamplingParams) -> list[Prompt]:
    """The prompts of all rows; their covers, if any, are the same: outcomes of one law."""
    rows = [model.read(text, params.continuation) for text in texts]
    ends = {None if row.cover is None or row.cover.only_aligned else row.cover.nodes for row in rows}
    if len(ends) == 1 and None not in ends:
        return rows
    return [model.read(text, "off") for text in texts]


def _longest(model: Model, rows: Sequence[Prompt], params: SamplingParams) -> int:
    """Tokens of the longest row with its answer: what the scaler of all of them is for."""
    lengths = []
    for number, row in enumerate(rows):
        try:
            lengths.append(check_length(model, len(row.ids), params))
        except ContextOverflow as error:
            where = f"contexts[{number - 1}] with the question" if number else "the question"
            raise ContextOverflow(
                f"{where}: {error}; or split it: rw.windows(text, model.tokenizer, tokens=...)"
            ) from error
    return max(lengths)


def _source(spoken: Tensor, outcome: int) -> int:
    """The context that speaks most for an outcome."""
    return int(spoken[:, min(outcome, spoken.shape[1] - 1)].argmax())
