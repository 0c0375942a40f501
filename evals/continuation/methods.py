"""Methods that continue a prompt which may end inside a token. P is the prompt.

    off             read P's tokens; any token may follow
    one token back  read all but the last, then draw among the tokens that begin with the last one's bytes
    step mask       read the certain tokens, then draw tokens that agree with the rest of P one by one, until P's end is
                    reached; each step masks the other tokens and renormalizes
    exact           draw one of the covers of P, each with its probability

    transformers    its `token_healing`, unchanged; only its text is visible

One token back is the remedy of kexue.fm 9762. The step mask is biased: a token that agrees with P
may leave a rest that is very unlikely after it, and renormalizing at every step ignores that.

A method is a set of forks: tokens that were read, and bytes of P with which the next token must
begin. The forks define the distribution of the text after P.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import Cache

from ...engine.cache import rewind
from ...engine.hf_model import input_device
from ...engine.model import Model
from ...engine.prefill import prefill
from ...engine.runners.runner import Runner
from ...engine.runners.transformers import TransformersRunner
from ...engine.token_healing import END, weigh
from ...tokenizer_tools.cover import Cover, cover, shared_length
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
    def _logweights(self) -> Tensor:
        """Logarithm of the weight of every next byte, not normalized; float64 [257]."""
        parts = [self._reader.extensions(fork.suffix) for fork in self._forks]
        nats = torch.cat(
            [
                self._reader.after(fork.path)[ids] + fork.logweight
                for fork, (ids, _) in zip(self._forks, parts, strict=True)
            ]
        )
        following = torch.cat([next_bytes for _, next_bytes in parts])
        most = torch.full((END + 1,), -math.inf, dtype=torch.float64).scatter_reduce(0, following, nats, "amax")
        most = most.nan_to_num(neginf=0.0)  # of a byte that no token has
        return torch.zeros_like(most).index_add(0, following, (nats - most[following]).exp()).log() + most

    @property
    def next_byte_logprobs(self) -> Tensor:
        """Log-probability of every next byte, and at index 256 of the end of the text; float64
        [257], nats."""
        return self._logweights - self._logweights.logsumexp(0)

    def logprob(self, rest: bytes) -> float:
        """Log-probability that the text continues with `rest`, over all token sequences, nats.

        Token sequences are visited in the order of their probability. The search ends when the
        remaining ones could add at most one percent, or after `_MOST_DISTRIBUTIONS` distributions.
        """
        trie, tokens = self._reader.vocabulary.trie, self._reader.vocabulary.tokens
        first, ties = list(self._forks), count()
        waiting: list[tuple[float, int, Fork]] = []  # after the `suffix` of these, any text may follow
        reached, computed = -math.inf, 0  # nats: a probability may be too small for a float

        def is_open() -> bool:
            unseen = _log_sum([-negative for negative, _, _ in waiting])
            return unseen > reached + math.log(_MISSED) and (computed < _MOST_DISTRIBUTIONS or reached == -math.inf)

        while first or is_open():
            computed += 1
            if first:
                fork = first.pop()
                least = len(fork.suffix)
                fork = Fork(path=fork.path, suffix=fork.suffix + rest, logweight=fork.logweight)
            else:
                _, _, fork = heapq.heappop(waiting)
                least = 0
            row = self._reader.after(fork.path) + fork.logweight
            complete = [*trie.exact(fork.suffix), *trie.extensions(fork.suffix)]
            reached = _log_sum([reached, *row[torch.tensor(complete, dtype=torch.long)].tolist()])
            for token in trie.prefixes(fork.suffix[:-1]):
                if len(tokens[token]) > least:
                    weight = float(row[token])
                    later = Fork(path=(*fork.path, token), suffix=fork.suffix[len(tokens[token]) :], logweight=weight)
                    heapq.heappush(waiting, (-weight, next(ties), later))
        return reached - float(self._logweights.logsumexp(0))


def _log_sum(nats: Sequence[float]) -> float:
    """The logarithm of the sum of probabilities; -inf for none."""
    return float(torch.tensor(nats, dtype=torch.float64).logsumexp(0)) if nats else -math.inf


OFF, ONE_BACK, STEPS, HEALING, EXACT = "off", "one token back", "step mask", "transformers", "exact"
METHODS = (OFF, HEALING, ONE_BACK, STEPS, EXACT)

_LEFT_OUT = 1e-3  # share of the step mask's distribution whose paths are not followed
_MOST_PATHS = 200  # at most this many paths: a long row of spaces has thousands


@dataclass(frozen=True, kw_only=True)
class MethodResult:
    """The likeliest beginning of an answer under a method.

    Attributes:
        ids: all tokens, including the prompt's.
        past: their bytes after the prompt.
        forwards: number of model runs.
        seconds: time, including the prompt.
    """

    ids: Path
    past: bytes
    forwards: int
    seconds: float


class _CountedRunner(TransformersRunner):
    """A runner that counts its runs."""

    def __init__(self, runner: Runner) -> None:
        super().__init__(runner.hf)
        self._runner, self.runs = runner, 0

    def forward(self, ids: Sequence[int], cache: Cache, logits_to_keep: int) -> Tensor:
        self.runs += 1
        return self._runner.forward(ids, cache, logits_to_keep)


class Ending:
    """The end of a prompt: its tokens, its covers, and the distributions of the methods for it.

    Args:
        prompt: text with at least one token that is certain.
    """

    def __init__(self, model: Model, runner: Runner, prompt: str) -> None:
        self.model, self.prompt, self._runner = model, prompt, _CountedRunner(runner)
        self.cover: Cover = cover(model.vocabulary, prompt)
        ids = self.cover.prompt
        certain = min(len(self.cover.common_prefix), len(ids) - 1)
        self.tail, self.common_prefix = ids[certain:], self.cover.common_prefix[certain:]
        self.reader = self._new_reader(ids[:certain])

    def distribution(self, method: str) -> Distribution:
        """The distribution of the following text, for every method except transformers' own."""
        forks = {OFF: self._off, ONE_BACK: self._one_back, STEPS: self._steps, EXACT: self._exact}[method]()
        return Distribution(self.reader, forks)

    def open(self, method: str) -> MethodResult:
        """Find the likeliest beginning, from an empty cache."""
        before, started = self._runner.runs, time.perf_counter()
        path, past = self._likeliest(method)
        seconds = time.perf_counter() - started
        return MethodResult(
            ids=self.reader.base + path, past=past, forwards=self._runner.runs - before, seconds=seconds
        )

    def finishes(self, opening: MethodResult, rest_of_token: bytes) -> bool:
        """True if the likeliest answer after `opening` begins with `rest_of_token`."""
        ids, past = opening.ids, opening.past
        tokens = self.model.vocabulary.tokens
        while (
            len(past) < len(rest_of_token)
            and rest_of_token.startswith(past)
            and ids[-1] not in self.model.vocabulary.special_ids
        ):
            token = int(self.reader.after(ids[len(self.reader.base) :]).argmax())
            ids, past = (*ids, token), past + (tokens[token] if token < len(tokens) else b"")
        return past.startswith(rest_of_token)

    def transformers_finishes(self, rest_of_token: bytes) -> bool:
        """`finishes` for transformers' `token_healing`, unchanged. False if it raises KeyError."""
        ids = torch.tensor([self.model.vocabulary.encode(self.prompt)], device=input_device(self.model.hf))
        config = GenerationConfig(
            token_healing=True, do_sample=False, max_new_tokens=len(rest_of_token), pad_token_id=0
        )
        try:
            out = self.model.hf.generate(ids, generation_config=config, tokenizer=self.model.tokenizer)
        except KeyError:  # 5.23 changes the bias of the last token, which it may not have stored
            return False
        text = self.model.vocabulary.text_bytes([i for i in out[0].tolist() if i < len(self.model.vocabulary.tokens)])
        return text.lstrip().startswith(self.prompt.lstrip().encode() + rest_of_token)  # transformers strips the prompt

    def _new_reader(self, base: Path) -> DistributionReader:
        return DistributionReader(self._runner, self.model.vocabulary, base, self._new_cache())

    def _new_cache(self) -> Cache:
        return self.model.new_cache(len(self.cover.prompt) + 64)

    def _start(self, method: str) -> tuple[Path, bytes]:
        """The tokens that a method reads, and the prompt's bytes after them."""
        if method == STEPS:
            return self.common_prefix, self.model.vocabulary.text_bytes(list(self.tail[len(self.common_prefix) :]))
        if method == OFF or self.tail[-1] in self.model.vocabulary.special_ids:
            return self.tail, b""
        return self.tail[:-1], self.model.vocabulary.tokens[self.tail[-1]]

    def _one_back(self) -> list[Fork]:
        path, last = self._start(ONE_BACK)
        if not last:
            return self._off()
        row = self.reader.after(path)
        same = self.model.vocabulary.trie.exact(last)
        return [
            Fork(path=path, suffix=last, logweight=0.0),
            *(Fork(path=(*path, token), suffix=b"", logweight=float(row[token])) for token in same),
        ]

    def _off(self) -> list[Fork]:
        return [Fork(path=self.tail, suffix=b"", logweight=0.0)]

    def _steps(self) -> list[Fork]:
        """The forks of the step mask. The likeliest paths are followed first.

        The search ends when the remaining paths have one part in a thousand together. They count as
        reading the prompt's own tokens, so that no byte is impossible.
        """
        tokens, trie = self.model.vocabulary.tokens, self.model.vocabulary.trie
        path, rest = self._start(STEPS)
        forks: list[Fork] = []
        waiting, left = [(0.0, path, rest)], 1.0
        while waiting and left > _LEFT_OUT and len(forks) < _MOST_PATHS:
            negative, path, rest = heapq.heappop(waiting)
            left -= math.exp(-negative)
            if not rest:
                forks.append(Fork(path=path, suffix=b"", logweight=-negative))
                continue
            row = self.reader.after(path)
            shorter, longer = trie.prefixes(rest), trie.extensions(rest)
            weight = -negative - float(row[torch.tensor(shorter + longer)].logsumexp(0))
            forks.append(Fork(path=path, suffix=rest, logweight=weight))
            for token in shorter:
                later = weight + float(row[token])
                left += math.exp(later)
                heapq.heappush(waiting, (-later, (*path, token), rest[len(tokens[token]) :]))
        return [*forks, Fork(path=self.tail, suffix=b"", logweight=math.log(left))] if waiting and left > 0 else forks

    def _exact(self) -> list[Fork]:
        forks = []
        for node in self.cover.nodes:
            path, weight = self.common_prefix, 0.0
            for token in node.path:
                weight += float(self.reader.after(path)[token])
                path = (*path, token)
            forks.append(Fork(path=path, suffix=node.suffix, logweight=weight))
        return forks

    def _likeliest(self, method: str) -> tuple[Path, bytes]:
        """Tokens after the reader's base up to the first token past the prompt's end, and their
        bytes past it."""
        tokens, trie = self.model.vocabulary.tokens, self.model.vocabulary.trie
        if method == EXACT:
            return self._likeliest_cover()
        path, rest = self._start(method)
        reader = self._new_reader(self.reader.base)
        while rest:
            allowed = [*(trie.prefixes(rest) if method == STEPS else trie.exact(rest)), *trie.extensions(rest)]
            token = allowed[int(reader.after(path)[torch.tensor(allowed)].argmax())]
            path = (*path, token)
            if len(tokens[token]) > len(rest):
                return path, tokens[token][len(rest) :]
            rest = rest[len(tokens[token]) :]
        token = int(reader.after(path).argmax())
        return (*path, token), tokens[token] if token < len(tokens) else b""

    def _likeliest_cover(self) -> tuple[Path, bytes]:
        vocabulary = self.model.vocabulary
        covers = weigh(self._runner, cover(vocabulary, self.prompt), None, self._new_cache(), vocabulary)
        best = int(covers.scores.argmax())
        node, token = covers.cover.nodes[int(covers.nodes[best])], int(covers.tokens[best])
        return (*self.common_prefix, *node.path, token), vocabulary.tokens[token][len(node.suffix) :]
