"""What the methods of `Model` return: `Completion` with its tokens, and `Score`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class TokenHealing:
    """What token healing did at the end of a prompt that may end inside a token.

    Attributes:
        backed_off: tokens at the end of the prompt that were not taken as certain.
        nodes: beginnings of covers that were weighed against each other; 1 is ordinary decoding.
        aligned: probability that a text with this prompt has a token border where the prompt ends.
        prompt_ids: tokens read before the first token of the answer.
        overlap: bytes of the answer's first token that belong to the prompt.
    """

    backed_off: int
    nodes: int
    aligned: float
    prompt_ids: list[int]
    overlap: int


@dataclass(frozen=True, kw_only=True)
class Token:
    """One decoded token.

    Attributes:
        logprob, top: its log-probability, and those of the likeliest tokens (id -> nats), if they were requested.
        source: index of the context that the token relied on, where the answer is over contexts.
        healing: set on the first token after a prompt whose covers were weighed. That token may begin inside the
            prompt.
    """

    id: int
    logprob: float | None = None
    top: dict[int, float] | None = None
    source: int | None = None
    healing: TokenHealing | None = None


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Token counts of one completion."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What `generate` returns: the new text, without the prompt.

    Attributes:
        text: whole characters. If the prompt ends inside a character, the text begins with that character.
        token_ids: the new tokens. The first may begin inside the prompt; `healing` says so.
        finish_reason: "stop" (an end token or a stop string), "length" or "time".
        logprobs: one `Token` for each id, if `SamplingParams.logprobs` is set.
        healing: what was done at the end of the prompt, where its covers were weighed.
        unfinished: the first bytes of a character, if the answer ends inside one.
        sources: the context that each token relied on, if the answer was over contexts.
    """

    text: str
    token_ids: list[int] = field(repr=False)
    finish_reason: str
    usage: Usage
    logprobs: list[Token] | None = field(default=None, repr=False)
    healing: TokenHealing | None = field(default=None, repr=False)
    unfinished: bytes = b""
    sources: list[int] | None = field(default=None, repr=False)

    def __str__(self) -> str:
        """The text, and a line that says how it ended."""
        usage = self.usage
        return (
            f"{self.text}\n[{usage.completion_tokens} tokens after a prompt of {usage.prompt_tokens}; "
            f"finish_reason {self.finish_reason!r}]"
        )


@dataclass(frozen=True, kw_only=True)
class Score:
    """Log-probabilities of a text, nats. `logprobs[t]` is that of `token_ids[t + 1]`, given the tokens before it.
    The first token has none."""

    token_ids: list[int] = field(repr=False)
    logprobs: Tensor = field(repr=False)
    text_bytes: int

    def __str__(self) -> str:
        """Loss, perplexity and bits per byte in one line."""
        count = len(self.logprobs)
        if not count:
            return f"{len(self.token_ids)} token(s): none has a token before it, so none has a log-probability"
        return (
            f"{self.loss:.4f} nats a token over {count:,} tokens "
            f"(perplexity {self.perplexity:.4g}, {self.bits_per_byte:.4g} bits a byte)"
        )

    def __repr__(self) -> str:
        return f"<Score {self}>"

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
