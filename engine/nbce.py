"""NBCE: the laws of the next token after many contexts, pooled into one.

Shape suffixes: n contexts, V vocabulary (or any other set of outcomes that the rows share).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import ConfigError, did_you_mean
from .sampling import nucleus

POOLINGS = ("entropy", "mean", "max")


@dataclass(frozen=True, kw_only=True)
class NBCE:
    """Naive Bayes-based context extension: one answer to a question over contexts that are read one by one.

        log p(T | S_1 .. S_n) = (beta + 1) P[log p(T | S_k)] - beta log p(T)

    token by token, p(T) being the law without any context. Where p(T) drops a token by its own top-p, P alone counts.
    What it cannot do: contexts have no order, each span of the answer comes from one of them, and a model that says
    with confidence that a context does not tell may win over one that does.
    Source: Su, kexue.fm/archives/9617 and 9632.

    Args:
        pooling: P. "entropy" takes the law of the context that is least uncertain; "mean" the mean of the logarithms;
            "max" the largest logarithm of every token.
        beta: how much of the law without context is taken away.
        top_p: of every row, before it is pooled; under "mean", whose rows would have no token in common, of the mean.
        stickiness: nats by which the context chosen for a token is preferred for the next one ("entropy" only).
        template: the text of a row; without a context, what is blank at its beginning goes.
    """

    pooling: Literal["entropy", "mean", "max"] = "entropy"
    beta: float = 0.25
    top_p: float = 0.95
    stickiness: float = 0.1
    template: str = "{context}\n\n{question}"

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise ConfigError(
                f"pooling {self.pooling!r} is none of {', '.join(POOLINGS)}.{did_you_mean(self.pooling, POOLINGS)}"
            )
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
        """One law from those of all rows.

        Args:
            logits: float32 [1 + n, V], the row without context first.
            last: the context chosen for the token before.

        Returns:
            The pooled scores [V], unnormalised nats, -inf for what is dropped; and how far each context speaks for each
            outcome, [n, V] nats or [n, 1]: the largest is the one that is relied on.
        """
        logprobs = logits.log_softmax(-1)
        kept = nucleus(logprobs, self.top_p)
        without = kept[0]
        if self.pooling == "entropy":
            entropy = -torch.where(kept.isfinite(), kept.exp() * kept, 0.0).sum(-1)[1:]
            if last is not None:
                entropy[last] -= self.stickiness
            spoken, pooled = -entropy[:, None], kept[1 + int(entropy.argmin())]
        else:
            spoken = logprobs[1:]
            pooled = kept[1:].amax(0) if self.pooling == "max" else nucleus(spoken.mean(0)[None], self.top_p)[0]
        return torch.where(without.isfinite(), (1 + self.beta) * pooled - self.beta * without, pooled), spoken
