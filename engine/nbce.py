"""NBCE: one answer over many contexts. The next-token distributions after each are pooled into one.

Shape suffixes: n contexts, V vocabulary (or any other set of outcomes that the rows share).
"""

from __future__ import annotations

import math
from collections import abc
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..errors import ConfigError, ContextOverflow, OutOfMemory, Setting, did_you_mean
from ..tokenizer_tools.vocabulary import check_text
from .batch import Batch, generate_tokens
from .cache import tokens_read
from .completion import Completion, Usage
from .hf_model import input_device
from .prefill import Progress, prefill
from .prefix_cache import ContextCaches
from .prompt import Prompt
from .rope_plan import RopePlan
from .runners.runner import Runner
from .sampling import SamplingParams, nucleus, random_source
from .scaled_model import ScaledModel
from .sequence import Sequence, draw_token, next_tokens, read_token
from .token_healing import draw_first_token, first_token_at, weigh

POOLINGS = ("entropy", "mean", "max")


@dataclass(frozen=True, kw_only=True)
class NBCE:
    """Naive Bayes-based context extension: one answer to a question over contexts that are read separately.

        log p(T | S_1 .. S_n) = (beta + 1) P[log p(T | S_k)] - beta log p(T)

    token by token, where p(T) is the distribution without context. Where top-p drops a token from p(T), P alone counts.
    Limits: contexts have no order, each span of the answer comes from one context, and a confident "not here" may
    win over a context that has the answer.
    Source: Su, kexue.fm/archives/9617 and 9632.

    Args:
        pooling: P. "entropy" takes the distribution with the lowest entropy; "mean" the mean of the logarithms;
            "max" the largest logarithm of every token.
        beta: weight of the distribution without context, which is subtracted.
        top_p: applied to every row before pooling; under "mean", applied to the mean.
        stickiness: nats by which the context chosen for a token is preferred for the next one ("entropy" only).
        template: the text of a row; leading blanks are stripped from the row without context.
    """

    pooling: Literal["entropy", "mean", "max"] = "entropy"
    beta: float = 0.25
    top_p: float = 0.95
    stickiness: float = 0.1
    template: str = "{context}\n\n{question}"

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise ConfigError(f"unknown pooling {self.pooling!r}.{did_you_mean(self.pooling, POOLINGS)}")
        checks = (
            (0 <= self.beta < math.inf, f"beta {self.beta:g} must be 0 or more"),
            (0 < self.top_p <= 1, f"top_p {self.top_p:g} must be above 0 and at most 1"),
            (0 <= self.stickiness < math.inf, f"stickiness {self.stickiness:g} must be 0 or more"),
        )
        for valid, message in checks:
            if not valid:
                raise ConfigError(message)
        for field in ("{context}", "{question}"):
            if self.template.count(field) != 1:
                raise ConfigError(f"template {self.template!r} must hold {field} once")

    def rows(self, question: str, contexts: list[str]) -> list[str]:
        """The texts of the rows: without a context, then with each."""
        without, template = self.template.replace("{context}", "").lstrip(), self.template.split("{question}")
        return [
            without.replace("{question}", question),
            *(question.join(part.replace("{context}", context) for part in template) for context in contexts),
        ]

    def pool(self, logits: Tensor, last: int | None) -> tuple[Tensor, Tensor]:
        """One distribution from those of all rows.

        Args:
            logits: float32 [1 + n, V], the row without context first.
            last: the context chosen for the token before.

        Returns:
            The pooled scores [V], unnormalised nats, -inf for dropped tokens; and the support of each context for each
            outcome, [n, V] nats or [n, 1]: the source is the largest.
        """
        logprobs = logits.log_softmax(-1)
        rows = nucleus(logprobs, self.top_p)
        without = rows[0]
        if self.pooling == "entropy":
            entropy = -torch.where(rows.isfinite(), rows.exp() * rows, 0.0).sum(-1)[1:]
            if last is not None:
                entropy[last] -= self.stickiness
            support, pooled = -entropy[:, None], rows[1 + int(entropy.argmin())]
        else:
            support = logprobs[1:]
            pooled = rows[1:].amax(0) if self.pooling == "max" else nucleus(support.mean(0)[None], self.top_p)[0]
        return torch.where(without.isfinite(), (1 + self.beta) * pooled - self.beta * without, pooled), support


class PooledSequence(Sequence):
    """One answer over contexts: one row without a context and one for each. Each new token goes to all rows.

    Args:
        caches: those of the last question, which are reused.
        progress: called after each step that reads a context.
        plan: the scaler of the request; None is the model's.

    Attributes:
        prompt_tokens: tokens of all rows together.

    Raises:
        ConfigError: there are no contexts, or one is blank; or the covers of "exact" cannot be pooled.
        ContextOverflow: a context with the question is longer than the scaler reaches.
    """

    shares_prefix = False

    def __init__(
        self,
        model: ScaledModel,
        question: str,
        contexts: abc.Sequence[str],
        nbce: NBCE,
        params: SamplingParams,
        caches: ContextCaches,
        progress: Progress | None = None,
        plan: RopePlan | None = None,
    ) -> None:
        _check_texts(question, contexts)
        self._model, self._nbce, self._context_caches = model, nbce, caches
        self._prompts = _read_rows(model, nbce.rows(question, list(contexts)), params, plan)
        self._longest = _longest_row(model, self._prompts, params, plan)
        self._read_ids = [prompt.ids for prompt in self._prompts]
        self._caches: list[Cache] = []
        self._pending: list[list[int]] = []
        resolved = model.resolved(params)
        super().__init__(self._prompts[0], resolved, model.vocabulary, model.stop_ids, progress=progress)

    def completion(self) -> Completion:
        """What `generate` returns; its usage counts the tokens of all rows."""
        completion = super().completion()
        usage = Usage(prompt_tokens=self.prompt_tokens, completion_tokens=len(self.tokens))
        return replace(completion, usage=usage)

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self._read_ids))

    def pieces(self) -> abc.Iterator[str]:
        """The text, piece by piece.

        Raises:
            ContextOverflow: all contexts together are more than memory holds.
        """
        with self._context_caches.borrowed(self._prompts) as prefix_caches:
            held = [prefix_cache.cache for prefix_cache in prefix_caches]
            self._model.check_room(*self.row_lengths, length=self._longest, caches=held)
            rope, interrupted = self._model.rope, True
            with self._model.running(self._longest, rope) as runner:
                for prefix_cache in prefix_caches:
                    if prefix_cache.rope_state != runner.rope_state:  # an answer depends on no earlier question
                        prefix_cache.clear()
                self._caches = [
                    prefix_cache.prepare_for(runner, prompt.certain_ids, self._longest)
                    for prefix_cache, prompt in zip(prefix_caches, self._prompts, strict=True)
                ]
            try:
                for pieces in generate_tokens(Batch(self._model, [self], self._longest, expected_rope=rope)):
                    yield from (piece for _, piece in pieces if piece)
                interrupted = False
            except GeneratorExit:  # is raised between two steps
                interrupted = False
                raise
            finally:
                ids = [token.id for token in self.tokens]
                for prefix_cache, read, prompt in zip(prefix_caches, self._read_ids, self._prompts, strict=True):
                    prefix_cache.truncate_to([*read, *ids] if ids else prompt.certain_ids, interrupted)

    @property
    def length(self) -> int:
        """Tokens of the longest row with its answer."""
        return self._longest

    @property
    def row_lengths(self) -> list[int]:
        return [len(prompt.ids) + self._params.max_new_tokens for prompt in self._prompts]

    @property
    def caches(self) -> list[Cache]:
        return self._caches

    @property
    def rows(self) -> list[tuple[list[int], Cache]]:
        return list(zip(self._pending, self._caches, strict=True))

    def release(self) -> None:
        self._caches = []

    def read_ahead(self, runner: Runner, most: int) -> bool:
        if not self._caches:
            self._caches = [runner.new_cache(self._longest) for _ in self._prompts]
        written = [token.id for token in self.tokens]
        for prompt, read_ids, cache in zip(self._prompts, self._read_ids, self._caches, strict=True):
            ids, held = [*read_ids, *written] if written else prompt.certain_ids, tokens_read(cache)
            if len(ids) - held > most:
                prefill(runner, ids[held : held + most], cache, self.progress)
                return False
        return True

    def first_token(self, runner: Runner) -> str:
        """Read all rows and draw the next token. The first is drawn among the covers of the question's end, if it has
        several."""
        params, penalty = self._params, self._params.repetition_penalty
        if self._generator is None:
            self._generator = random_source(params, input_device(runner.hf))
        covers = [prompt.cover_to_weigh for prompt in self._prompts]
        if self.tokens or covers[0] is None:
            written = [token.id for token in self.tokens]
            last = [
                prefill(runner, [*read_ids, *written][tokens_read(cache) :], cache, self.progress)[-1]
                for read_ids, cache in zip(self._read_ids, self._caches, strict=True)
            ]
            if not self.tokens:
                self._seen.add(self._prompts[0].ids)
            return next_tokens(runner, [self], torch.stack(last))[0]
        weighed = [
            weigh(runner, cover, prompt.start, cache, self._vocabulary, penalty, self.progress)
            for cover, prompt, cache in zip(covers, self._prompts, self._caches, strict=True)
            if cover is not None
        ]
        scores, support = self._nbce.pool(torch.stack([covers.logprobs - covers.total for covers in weighed]), None)
        penalties = weighed[0].scores - weighed[0].logprobs
        pooled = replace(weighed[0], scores=scores + penalties, logprobs=scores.log_softmax(-1))
        first = draw_first_token(pooled, self._caches[0], params, self._generator)
        others = zip(weighed[1:], self._caches[1:], strict=True)
        firsts = [first, *(first_token_at(covers, cache, first.index) for covers, cache in others)]
        self._read_ids = [each.token.healing.prompt_ids for each in firsts if each.token.healing]
        chosen = torch.tensor([first.index], device=support.device)
        piece = self.push(replace(first.token, source=int(_source(support, chosen))))
        self._pending = [each.pending for each in firsts]
        return piece

    takes_likeliest = False

    def draw(self, logits: Tensor) -> Tensor:
        assert self._generator is not None
        last = self.tokens[-1].source if self.tokens else None
        scores, support = self._nbce.pool(logits, last)
        token = draw_token(scores, self._seen, self._params, self._generator)
        return torch.cat((token, _source(support, token[:1].long())))

    def take(self, drawn: list[float]) -> str:
        *numbers, source = drawn
        token = read_token(numbers)
        piece = self.push(replace(token, source=int(source)))
        self._pending = [[token.id]] * len(self._caches)
        return piece


def check_pooling(pooling: object, contexts: abc.Sequence[str] | None) -> None:
    """Refuse a pooling without contexts, where it would do nothing.

    Raises:
        ConfigError: with the next step.
    """
    if contexts is None and pooling != "entropy":
        raise ConfigError(f"pooling {pooling!r} is for answers over contexts; give contexts=[...], or leave it out")


def complete_pooled(questions: abc.Iterable[PooledSequence]) -> list[Completion]:
    """Generate several answers over contexts, one after another.

    Raises:
        OutOfMemory: `finished` holds the answers before.
    """
    completions: dict[int, Completion] = {}
    try:
        for index, sequence in enumerate(questions):
            for _ in sequence.pieces():
                pass
            completions[index] = sequence.completion()
    except OutOfMemory as error:
        error.finished = completions
        raise
    return list(completions.values())


def _check_texts(question: str, contexts: abc.Sequence[str]) -> None:
    if isinstance(contexts, str):
        raise ConfigError(
            "contexts is a string; give a list: [text], or rw.windows(text, tokenizer, ...) for a long text"
        )
    if not contexts:
        raise ConfigError("contexts is empty; give at least one text, or omit it")
    for text in (question, *contexts):
        check_text(text)
    if blank := [n for n, context in enumerate(contexts) if not context.strip()]:
        raise ConfigError(f"contexts[{blank[0]}] is blank; omit it (there is always a row without context)")
    if not question.strip():
        raise ConfigError("the prompt is blank; with contexts, it is the question that follows each of them")


def _read_rows(model: ScaledModel, texts: list[str], params: SamplingParams, plan: RopePlan | None) -> list[Prompt]:
    """The prompts of all rows. If they have covers, those are the same in all rows, so that they can be pooled.

    Raises:
        ConfigError: the covers of two rows differ, and the parameters ask for "exact".
    """
    rows = [model.read(text, params.continuation, plan=plan) for text in texts]
    ends = [None if row.cover_to_weigh is None else row.cover_to_weigh.nodes for row in rows]
    other = next((number for number, end in enumerate(ends) if end != ends[0]), None)
    if other is None and ends[0] is not None:
        return rows
    if other is not None and params.continuation == "exact":
        raise ConfigError(
            f"the prompt ends in other covers after contexts[{other - 1}] than without a context, so those of all rows "
            "cannot be pooled; make the prompt longer, or let a token begin at its end: ",
            Setting("continuation", "auto"),
        )
    return [model.read(text, "off", plan=plan) for text in texts]


def _longest_row(model: ScaledModel, rows: abc.Sequence[Prompt], params: SamplingParams, plan: RopePlan | None) -> int:
    """Tokens of the longest row with its answer, which is the length that the scaler is prepared for."""
    lengths = []
    for number, row in enumerate(rows):
        try:
            lengths.append(model.check_reach(len(row.ids), params, plan))
        except ContextOverflow as error:
            where = f"contexts[{number - 1}] with the question" if number else "the question"
            raise ContextOverflow(
                f"{where}: ",
                *error.args,
                "; or split it: ",
                Setting("window", "2k", python="rw.windows(text, model.tokenizer, tokens=...)"),
            ) from error
    return max(lengths)


def _source(support: Tensor, outcome: Tensor) -> Tensor:
    """The index of the context that supports an outcome most; both are int64 [1] on the device of `support`."""
    return support.index_select(1, outcome.clamp(max=support.shape[1] - 1)).argmax(0)
