"""What the model object returns."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from .decode import Token
from .token_healing import Continuation


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Token counts of one completion."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What `generate` returns: the new text, without the prompt.

    `text` has whole characters; where it ends inside one, `unfinished` has the bytes of that so far. A character that
    the prompt ends inside counts to the text.
    `token_ids` are the new tokens. The first of them may begin inside the prompt: `continuation` is set where that was
    weighed.
    `finish_reason` is "stop" (an end token or stop string came), "length" or "time". `logprobs` holds one `Token` for
    each id if `SamplingParams.logprobs` asked for them, `sources` the index of the context that each relied on if the
    answer was over contexts.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    usage: Usage
    logprobs: list[Token] | None = None
    continuation: Continuation | None = None
    unfinished: bytes = b""
    sources: list[int] | None = None


@dataclass(frozen=True, kw_only=True)
class Score:
    """Log-probabilities of a text, nats. `logprobs[t]` is that of `token_ids[t + 1]` given the tokens before it;
    the first token has none."""

    token_ids: list[int]
    logprobs: Tensor
    text_bytes: int

    @property
    def loss(self) -> float:
        """Mean negative log-probability, nats a token."""
        return -float(self.logprobs.double().mean())

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """Total negative log2-probability over the bytes of the text."""
        return -float(self.logprobs.double().sum()) / math.log(2) / self.text_bytes
