"""A sequence whose prompt is scored while it is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .cache import rewind, tokens_read
from .prefill import most_scored, prefill
from .runners.runner import Runner
from .sequence import Sequence


@dataclass(frozen=True, kw_only=True)
class ScoredToken:
    """A token of a prompt, given all before it.

    Attributes:
        logprob: its log-probability, nats.
        rank: 1 for the likeliest token.
        top: the likeliest tokens with their log-probabilities, the likeliest first.
    """

    id: int
    logprob: float
    rank: int
    top: dict[int, float]


class ScoredSequence(Sequence):
    """A sequence with the log-probabilities of its prompt's tokens.

    Args:
        alternatives: number of likeliest tokens that are returned for each token.
        writes: whether an answer follows. If False, the sequence ends when the prompt is read.

    Attributes:
        scored: one for every token of the prompt but the first.
    """

    def __init__(self, *args: Any, alternatives: int, writes: bool, **more: Any) -> None:
        super().__init__(*args, **more)
        self.scored: list[ScoredToken] = []
        self._alternatives, self._writes = alternatives, writes

    shares_prefix = False  # what is not read here is not scored

    @property
    def length(self) -> int:
        return super().length if self._writes else len(self.prompt.ids)

    def read_ahead(self, runner: Runner, most: int) -> bool:
        ids = self.prompt.ids
        if self.cache is None:
            self.cache, self.scored = runner.new_cache(self.length), []
        start = len(self.scored)
        rewind(self.cache, tokens_read(self.cache) - start)  # drops a chunk in which memory ran out
        stop = min(start + min(most, most_scored(runner)), len(ids) - 1)
        if start < stop:
            logits = prefill(runner, ids[start:stop], self.cache, logits_to_keep=stop - start)
            self.scored += _scored(
                logits[:, : runner.vocabulary_size].float(), ids[start + 1 : stop + 1], self._alternatives
            )
        if stop < len(ids) - 1:
            return False
        if not self._writes:
            self.end("length")
        return True


def _scored(logits: Tensor, ids: list[int], alternatives: int) -> list[ScoredToken]:
    """Log-probabilities of `ids` under logits [tokens, V]."""
    targets = torch.tensor(ids, device=logits.device)[:, None]
    chosen = logits.gather(-1, targets)
    ranks = (logits > chosen).sum(-1) + 1
    total = logits.logsumexp(-1, keepdim=True)
    top = logits.topk(min(alternatives, logits.shape[-1]))
    rows = zip(
        ids,
        (chosen - total)[:, 0].tolist(),
        ranks.tolist(),
        top.indices.tolist(),
        (top.values - total).tolist(),
        strict=True,
    )
    return [
        ScoredToken(id=token, logprob=logprob, rank=rank, top=dict(zip(tokens, values, strict=True)))
        for token, logprob, rank, tokens, values in rows
    ]
