"""One answer in progress: its prompt, cache and tokens, its text up to a stop string, and why it ended."""

from __future__ import annotations

import math
import time
from collections import abc
from itertools import islice
from typing import ClassVar

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..tokenizer_tools.characters import first_characters
from ..tokenizer_tools.stop_strings import StopStringMatcher
from ..tokenizer_tools.vocabulary import Vocabulary
from . import tensor_parallel
from .cache import rewind, tokens_read
from .completion import Completion, Token, TokenHealing, Usage
from .hf_model import input_device
from .prefill import Progress, prefill
from .prompt import Prompt
from .runners.runner import Runner
from .sampling import ResolvedParams, SeenTokens, not_finite, random_source, sample
from .token_healing import draw_first_token, weigh


class Sequence:
    """One answer in progress; not a `collections.abc.Sequence`.

    `generate_tokens` runs its `rows` and gives the logits to `next_tokens`. `tokenizer_tools.stream` makes text of the
    tokens: `TextStream` whole characters, `StopStringMatcher` the part before a stop string.

    Args:
        vocabulary: the tokenizer's tokens as bytes.
        stop_ids: tokens that end the text.
        cache: may hold the beginning of the prompt; it is written to. None makes a new one.
        progress: called after each step that reads the prompt.

    Attributes:
        progress: as given. It may be set until the prompt is read.
        prompt_ids: tokens read before the first token of the answer.
        tokens: those of the answer.
        pending: tokens to run next, on top of the cache.
        finish_reason: "stop", "length", "time" or "cancelled" once `done`.
        reused: tokens of the prompt that came with a cache of another sequence.
    """

    shares_prefix: ClassVar[bool] = True  # may begin with a cache of another sequence

    def __init__(
        self,
        prompt: Prompt,
        params: ResolvedParams,
        vocabulary: Vocabulary,
        stop_ids: frozenset[int],
        cache: Cache | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.prompt, self.cache = prompt, cache
        self.progress = progress
        self.prompt_ids = prompt.ids
        self.tokens: list[Token] = []
        self.pending: list[int] = []
        self.finish_reason = "length"
        self.done = False
        self.reused = 0
        self._params, self._vocabulary, self._stop_ids = params, vocabulary, stop_ids
        self._generator: torch.Generator | None = None
        self._seen = SeenTokens(params.repetition_penalty)
        self._stream, self._matcher = prompt.text_stream(vocabulary), StopStringMatcher(params.stops)
        self._deadline = math.inf if params.max_time is None else time.monotonic() + params.max_time
        self._pieces: list[str] = []

    @property
    def length(self) -> int:
        """Tokens of the prompt and `max_new_tokens`."""
        return len(self.prompt.ids) + self._params.max_new_tokens

    @property
    def row_lengths(self) -> list[int]:
        """Tokens of the prompt and `max_new_tokens` in each row."""
        return [self.length]

    @property
    def caches(self) -> list[Cache]:
        """The caches of the rows."""
        return [] if self.cache is None else [self.cache]

    def release(self) -> None:
        """Free the cache. `first_token` then reads prompt and answer again, and continues."""
        self.cache = None

    @property
    def rows(self) -> list[tuple[list[int], Cache]]:
        """What to run for the next token: tokens, and the cache that they follow."""
        assert self.cache is not None
        return [(self.pending, self.cache)]

    @property
    def read_ids(self) -> list[int]:
        """The tokens of the prompt, as they were read, and of the answer."""
        return [*self.prompt_ids, *(token.id for token in self.tokens)]

    def read_ahead(self, runner: Runner, most: int) -> bool:
        """Read up to `most` tokens of a long prompt. True once at most that many are left for `first_token`."""
        ids = self.read_ids if self.tokens else self.prompt.certain_ids
        if self.cache is None:
            if len(ids) <= most:
                return True
            self.cache = runner.new_cache(self.length)
        if len(ids) - (held := tokens_read(self.cache)) <= most:
            return True
        prefill(runner, ids[held : held + most], self.cache, self.progress)
        return False

    def first_token(self, runner: Runner) -> str:
        """Read the prompt, and the tokens of the answer so far, and draw the next token.

        Returns:
            The text that became certain.
        """
        params = self._params
        if self.cache is None:
            self.cache = runner.new_cache(self.length)
        if self._generator is None:
            self._generator = random_source(params, input_device(runner.hf))
        cover = None if self.tokens else self.prompt.cover_to_weigh
        if cover is not None:
            penalty = params.repetition_penalty
            covers = weigh(runner, cover, self.prompt.start, self.cache, self._vocabulary, penalty, self.progress)
            first = draw_first_token(covers, self.cache, params, self._generator)
            return self.push(first.token, first.pending)
        ids = self.read_ids
        if (excess := tokens_read(self.cache) - len(ids) + 1) > 0:  # the last token is run to see what follows it
            rewind(self.cache, excess)
        if not self.tokens:
            self._seen.add(ids)
        logits = prefill(runner, ids[tokens_read(self.cache) :], self.cache, self.progress)
        return next_tokens(runner, [self], logits)[0]

    @property
    def takes_likeliest(self) -> bool:
        """True if the next token is that of the largest logit, and nothing else is asked about it."""
        params = self._params
        return params.temperature == 0 and params.repetition_penalty == 1 and params.logprobs is None

    def draw(self, logits: Tensor) -> Tensor:
        """Draw the token that follows `rows`. The host does not wait for it.

        Args:
            logits: after each row, float32 [rows, V].

        Returns:
            Numbers for `take`, int64 or float64 [n] on the device of the logits.
        """
        assert self._generator is not None
        return draw_token(logits[-1], self._seen, self._params, self._generator)

    def take(self, drawn: list[float]) -> str:
        """Append the token that `draw` has drawn.

        Returns:
            The text that became certain.
        """
        return self.push(read_token(drawn))

    def push(self, token: Token, pending: list[int] | None = None) -> str:
        """Append the next token.

        Args:
            pending: what to run next, if it is more than the token.

        Returns:
            The text that became certain.
        """
        overlap = 0
        if token.healing is not None:
            overlap, self.prompt_ids = token.healing.overlap, token.healing.prompt_ids
            self._seen.add(self.prompt_ids)
        self._seen.add((token.id,))
        self.tokens.append(token)
        self.pending = pending or [token.id]
        if token.id in self._stop_ids:
            piece = self.end("stop")
        else:
            piece = self._matcher.push(self._stream.push(token.id, overlap))
            if self._matcher.stopped:  # the piece is what comes before the stop string
                self.finish_reason, self.done = "stop", True
            elif len(self.tokens) == self._params.max_new_tokens:
                piece += self.end("length")
            elif self._is_late:
                piece += self.end("time")
        if piece:
            self._pieces.append(piece)
        return piece

    def end(self, reason: str) -> str:
        """End the answer.

        Returns:
            The text that was held back because a stop string might have begun in it.
        """
        self.finish_reason, self.done = reason, True
        return self._matcher.finish()

    def end_if_late(self) -> str:
        """End an answer that waits for its next token, if its time is over.

        Returns:
            The text that was held back because a stop string might have begun in it.
        """
        if self.done or not self._is_late:
            return ""
        piece = self.end("time")
        self._pieces.append(piece)
        return piece

    @property
    def _is_late(self) -> bool:
        if self._deadline == math.inf:
            return False
        return bool(tensor_parallel.broadcast_from_rank0(time.monotonic() > self._deadline))

    @property
    def healing(self) -> TokenHealing | None:
        """What was done at the end of the prompt, if its covers were weighed."""
        return self.tokens[0].healing if self.tokens else None

    @property
    def text(self) -> str:
        """The answer in whole characters. If the prompt ends inside a character, it begins with that character."""
        return "".join(self._pieces)

    @property
    def data(self) -> bytes:
        """The answer in UTF-8, without bytes of the prompt. It may begin and end inside a character."""
        start = self.prompt.unfinished
        data = start + self._stream.data
        return (first_characters(data, len(self.text)) if self._matcher.hides_text else data)[len(start) :]

    def completion(self) -> Completion:
        """What `generate` returns."""
        return Completion(
            text=self.text,
            unfinished=b"" if self._matcher.hides_text else self._stream.unfinished,
            token_ids=[token.id for token in self.tokens],
            finish_reason=self.finish_reason,
            usage=Usage(prompt_tokens=len(self.prompt_ids), completion_tokens=len(self.tokens)),
            logprobs=self.tokens if self._params.logprobs is not None else None,
            healing=self.healing,
            sources=[token.source for token in self.tokens if token.source is not None] or None,
        )


def next_tokens(runner: Runner, sequences: abc.Sequence[Sequence], logits: Tensor) -> list[str]:
    """Draw and append the token that follows the rows of each sequence. The host waits for the device once.

    Args:
        logits: after each row of the sequences, in order, [rows, V].

    Returns:
        The text that became certain in each sequence.

    Raises:
        UnsupportedModel: a logit is NaN or infinite.
    """
    counts = [len(sequence.caches) for sequence in sequences]
    logits = logits[:, : runner.vocabulary_size].float()
    draws = list(torch.split(logits, counts))
    peaks, indices = logits.max(-1)
    likeliest, is_finite = torch.split(indices, counts), peaks.isfinite().all()
    for index, sequence in enumerate(sequences):
        draws[index] = likeliest[index] if sequence.takes_likeliest else sequence.draw(draws[index])
    numbers = iter(torch.cat([is_finite[None], *draws]).tolist())
    if not next(numbers):
        raise not_finite(runner.hf)
    return [sequence.take(list(islice(numbers, len(drawn)))) for sequence, drawn in zip(sequences, draws, strict=True)]


def draw_token(logits_V: Tensor, seen: SeenTokens, params: ResolvedParams, generator: torch.Generator) -> Tensor:
    """Draw a token from float32 logits. The host does not wait for it.

    Args:
        seen: tokens that the repetition penalty applies to.

    Returns:
        What `read_token` reads, on the device of the logits: the token, int64 [1]. If log-probabilities are asked for,
        float64, which holds all exactly: the token, its log-probability, the likeliest tokens, and theirs.
    """
    token = sample(seen.penalized(logits_V), params, generator)[None]
    if params.logprobs is None:
        return token
    logprobs = logits_V.log_softmax(-1)
    top = logprobs.topk(min(params.logprobs, len(logprobs)))
    return torch.cat([part.double() for part in (token, logprobs[token], top.indices, top.values)])


def read_token(drawn: list[float]) -> Token:
    """The token that `draw_token` has drawn."""
    token, *rest = drawn
    if not rest:
        return Token(id=int(token))
    logprob, *top = rest
    likeliest = zip(top[: len(top) // 2], top[len(top) // 2 :], strict=True)
    return Token(
        id=int(token),
        logprob=logprob,
        top={int(index): value for index, value in likeliest if value > -math.inf},
    )
