"""Distributions of the text after a prompt that may end inside a token.

Every continuation method gives a set of *forks*: tokens that were read, and bytes of the prompt
with which the next token must begin. Together the forks define the distribution of the text that
follows.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ...engine.cache import rewind
from ...engine.prefill import prefill
from ...engine.runners.runner import Runner
from ...engine.token_healing import END
from ...tokenizer_tools.cover import shared_length
from ...tokenizer_tools.vocabulary import Vocabulary

Path = tuple[int, ...]

_MISSED = 0.01  # share of the probability of the given bytes that may be left out
_MOST_DISTRIBUTIONS = 200  # most next-token distributions that are computed for one probability


class DistributionReader:
    """The model's next-token distributions after token sequences with a common beginning. Each is
    computed once.

    Args:
        base: the common beginning, not empty.
        cache: an empty cache that can be rewound.
    """

    def __init__(self, runner: Runner, vocabulary: Vocabulary, base: Path, cache: Cache) -> None:
        assert base
        self.vocabulary, self.base = vocabulary, base
        self._runner, self._cache = runner, cache
        self._cached: Path = ()
        self._logprobs: dict[Path, Tensor] = {}
        self._extensions: dict[bytes, tuple[Tensor, Tensor]] = {}

    def after(self, path: Path) -> Tensor:
        """Log-probabilities of the token after the base and `path`, float64 [V] on the CPU, nats."""
        if path not in self._logprobs:
            whole = self.base + path
            shared = shared_length(self._cached, whole[:-1])  # the last token must be run again to get its logits
            if len(self._cached) > shared:
                rewind(self._cache, len(self._cached) - shared)
            logits = prefill(self._runner, list(whole[shared:]), self._cache)[-1]
            self._cached = whole
            self._logprobs[path] = logits.double().log_softmax(-1).cpu()
        return self._logprobs[path]

    def extensions(self, suffix: bytes) -> tuple[Tensor, Tensor]:
        """The tokens that begin with `suffix` and are longer, and the next byte of each.

        For an empty suffix these are all tokens. `END` stands for the byte of special tokens.
        """
        if suffix not in self._extensions:
            tokens, special_ids = self.vocabulary.tokens, self.vocabulary.special_ids
            if suffix:
                ids = self.vocabulary.trie.extensions(suffix)
                next_bytes = [tokens[i][len(suffix)] for i in ids]
            else:  # some models have more logits than tokens
                ids = list(range(len(self.after(()))))
                next_bytes = [END if i >= len(tokens) or i in special_ids else tokens[i][0] for i in ids]
            self._extensions[suffix] = torch.tensor(ids, dtype=torch.long), torch.tensor(next_bytes, dtype=torch.long)
        return self._extensions[suffix]


@dataclass(frozen=True, kw_only=True)
class Fork:
    """Tokens that were read, and the bytes with which the next token must begin.

    Attributes:
        path: the tokens after the reader's base.
        suffix: bytes of the prompt after `path`. The next token begins with them and is longer. If
            there are none, any token may follow.
        logweight: nats. The probability of an allowed next token is proportional to exp(logweight)
            times its probability after `path`, normalized over all forks of a distribution.
    """

    path: Path
    suffix: bytes
    logweight: float


class Distribution:
    """The distribution of the text after a prompt, from the forks of a method."""

    def __init__(self, reader: DistributionReader, forks: Sequence[Fork]) -> None:
        self._reader, self._forks = reader, forks

    @cached_property
    def _weights(self) -> Tensor:
        """Weight of every next byte, not normalized; float64 [257]."""
        weights = torch.zeros(END + 1, dtype=torch.float64)
        for fork in self._forks:
            ids, following = self._reader.extensions(fork.suffix)
            weights.index_add_(0, following, (self._reader.after(fork.path)[ids] + fork.logweight).exp())
        return weights

    @property
    def next_byte_logprobs(self) -> Tensor:
        """Log-probability of every next byte, and at index 256 of the end of the text; float64
        [257], nats."""
        return (self._weights / self._weights.sum()).log()

    def logprob(self, rest: bytes) -> float:
        """Log-probability that the text continues with `rest`, over all token sequences, nats.

        Token sequences are visited in the order of their probability. The search ends when the
        remaining ones could add at most one percent, or after `_MOST_DISTRIBUTIONS` distributions.
        """
        trie, tokens = self._reader.vocabulary.trie, self._reader.vocabulary.tokens
        first, ties = list(self._forks), count()
        waiting: list[tuple[float, int, Fork]] = []  # after the `suffix` of these, any text may follow
        reached = unseen = 0.0
        computed = 0
        while first or (waiting and unseen > _MISSED * reached and (computed < _MOST_DISTRIBUTIONS or not reached)):
            computed += 1
            if first:
                fork = first.pop()
                least = len(fork.suffix)
                fork = Fork(path=fork.path, suffix=fork.suffix + rest, logweight=fork.logweight)
            else:
                negative, _, fork = heapq.heappop(waiting)
                least, unseen = 0, unseen - math.exp(-negative)
            row = self._reader.after(fork.path) + fork.logweight
            complete = [*trie.exact(fork.suffix), *trie.extensions(fork.suffix)]
            reached += float(row[torch.tensor(complete, dtype=torch.long)].exp().sum())
            for token in trie.prefixes(fork.suffix[:-1]):
                if len(tokens[token]) > least:
                    weight = float(row[token])
                    unseen += math.exp(weight)
                    later = Fork(path=(*fork.path, token), suffix=fork.suffix[len(tokens[token]) :], logweight=weight)
                    heapq.heappush(waiting, (-weight, next(ties), later))
        return math.log(reached / float(self._weights.sum()))
