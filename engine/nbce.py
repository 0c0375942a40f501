"""NBCE: the next-token distributions after many contexts, pooled into one.

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
