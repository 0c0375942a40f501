"""The first token after a prompt that may end inside a token: one draw among all covers of the prompt.

A cover's probability is that of its tokens before the last one, times that of the last one. Together they are the
distribution of the text that follows the prompt's *text*; after the first draw, decoding is ordinary.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..errors import ConfigError, Setting
from ..tokenizer_tools.cover import Cover, shared_length
from ..tokenizer_tools.vocabulary import Vocabulary
from .cache import can_rewind, rewind, tokens_read
from .completion import Continuation, Token
from .prefill import Progress, prefill
from .runners.runner import Runner
from .sampling import SamplingParams, penalize_repetition, sample
from .score import score

END = 256  # the index of "the text ends here" among next bytes

Path = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Covers:
    """The covers of a prompt with their probabilities.

    Attributes:
        context: the certain tokens as they were read, or a start token if there are none.
        nodes, tokens: the node of every cover, and its last token; int64 [covers].
        scores: log-probability given `context`, with the repetition penalty; sampled from.
        logprobs: log-probability given `context`, nats; float32 [covers].
        held: the tokens that the cache holds after `context`.
    """

    cover: Cover
    context: list[int]
    nodes: Tensor
    tokens: Tensor
    scores: Tensor
    logprobs: Tensor
    held: Path

    @property
    def total(self) -> float:
        """Log-probability that a text continues from `context` with the rest of the prompt's bytes, nats."""
        return float(self.logprobs.double().logsumexp(0))

    @property
    def aligned(self) -> float:
        """Probability of a token border at the end of the prompt."""
        ends = torch.tensor([node.aligned for node in self.cover.nodes], device=self.nodes.device)
        return float((self.logprobs[ends[self.nodes]].double().logsumexp(0) - self.total).exp())

    def next_byte_logprobs(self, vocabulary: Vocabulary) -> Tensor:
        """Log-probability of every byte to follow the prompt, and at index 256 that it ends; float32 [257], nats."""
        skips = [len(node.suffix) for node in self.cover.nodes]
        tokens, special_ids = (
            vocabulary.tokens,
            vocabulary.special_ids,
        )  # some models have more logits than there are tokens
        next_bytes = torch.tensor(
            [
                END if token >= len(tokens) or token in special_ids else tokens[token][skips[node]]
                for node, token in zip(self.nodes.tolist(), self.tokens.tolist(), strict=True)
            ]
        )
        total = torch.zeros(257, dtype=torch.float64)
        total.index_add_(0, next_bytes, (self.logprobs.double().cpu() - self.total).exp())
        return total.log().float()


def weigh(
    runner: Runner,
    cover: Cover,
    start: int | None,
    cache: Cache,
    vocabulary: Vocabulary,
    penalty: float = 1.0,
    progress: Progress | None = None,
) -> Covers:
    """Run the certain tokens and the paths of a cover, and weigh every cover.

    Args:
        start: token to read first where no token is certain.
        cache: may hold the beginning of the prompt, or more of it; afterwards it holds `Covers.context` and
            `Covers.held`.
        penalty: the repetition penalty of `scores`.
        progress: called after each step that reads the certain tokens.

    Raises:
        ConfigError: no token is certain and there is no start token.
        PatchError: the cache holds more than the certain tokens and cannot be rewound.
    """
    context = list(cover.common_prefix) or ([] if start is None else [start])
    if not context:
        raise ConfigError(
            f"no token of {cover.text.decode(errors='replace')!r} is certain and this tokenizer has no start token to "
            "read before it; give a longer prompt, or set ",
            Setting("continuation", "off"),
        )
    found, held = _path_logits(runner, context, [node.path for node in cover.nodes], cache, progress)
    logits = {path: row[..., : runner.vocabulary_size] for path, row in found.items()}
    seen_before = torch.tensor([] if penalty == 1 else list(dict.fromkeys(context)), dtype=torch.int64)
    parts = []
    for n, node in enumerate(cover.nodes):
        row = logits[node.path]
        steps = (logits[node.path[:k]].log_softmax(-1)[token] for k, token in enumerate(node.path))
        logprobs = row.log_softmax(-1) + sum(steps, torch.zeros((), device=row.device))
        scores = logprobs
        if penalty != 1:
            seen = torch.cat([seen_before, torch.tensor(node.path, dtype=torch.int64)]).to(row.device)
            scores = logprobs + penalize_repetition(row, seen, penalty) - row
        tokens = torch.arange(len(row)) if node.aligned else torch.tensor(vocabulary.trie.extensions(node.suffix))
        tokens = tokens.to(row.device)
        parts.append((torch.full_like(tokens, n), tokens, scores[tokens], logprobs[tokens]))
    nodes, tokens, scores, logprobs = (torch.cat(part) for part in zip(*parts, strict=True))
    return Covers(cover=cover, context=context, nodes=nodes, tokens=tokens, scores=scores, logprobs=logprobs, held=held)


def text_logprob(
    runner: Runner, cover: Cover, start: int | None, first: int, cache: Cache, vocabulary: Vocabulary
) -> float:
    """Log-probability that a text begins with the prompt, given the first `first` of its certain tokens, nats.

    Args:
        start: token to read first, not counted in `first`; None if some tokens are given.
        cache: an empty one.
    """
    context = [*([] if start is None else [start]), *cover.common_prefix]
    first += start is not None
    certain = float(score(runner, context, first, cache).double().sum()) if len(context) > first else 0.0
    return certain + weigh(runner, replace(cover, common_prefix=tuple(context)), None, cache, vocabulary).total


def _path_logits(
    runner: Runner, context: list[int], paths: Sequence[Path], cache: Cache, progress: Progress | None
) -> tuple[dict[Path, Tensor], Path]:
    """Float32 logits [V] after every beginning of the paths, and the path that the cache is left at."""
    leaves = [path for path in dict.fromkeys(paths) if not any(_goes_on(other, path) for other in paths)]
    if (excess := tokens_read(cache) - len(context) + 1) > 0:
        rewind(cache, excess)
    rewinds = can_rewind(cache, max(map(len, leaves), default=0))
    leaves.sort(key=len, reverse=True)
    held = leaves.pop(0) if rewinds else ()
    unread = [*context, *held][tokens_read(cache) :]
    rows = prefill(runner, unread, cache, progress, logits_to_keep=len(held) + 1).float()
    logits = {held[:k]: row for k, row in enumerate(rows)}
    if rewinds and leaves and runner.runs_trees and (len(leaves) > 1 or runner.is_compiled):
        rewind(cache, len(held))
        paths = list(dict.fromkeys(leaf[: k + 1] for leaf in leaves for k in range(len(leaf))))
        rows = runner.tree(paths, cache).float()
        return logits | dict(zip(paths, rows, strict=True)), ()
    for leaf in leaves:
        common = shared_length(held, leaf)
        if rewinds:
            rewind(cache, len(held) - common)
            held, branch = leaf, cache
        else:
            branch = copy.deepcopy(cache)
        rows = runner.forward(list(leaf[common:]), branch, logits_to_keep=len(leaf) - common).float()
        logits.update({leaf[: common + k + 1]: row for k, row in enumerate(rows)})
    return logits, held


def _goes_on(longer: Path, path: Path) -> bool:
    return len(longer) > len(path) and longer[: len(path)] == path


@dataclass(frozen=True, kw_only=True)
class FirstToken:
    """The first token after a prompt, drawn among its covers.

    Attributes:
        index: which of the covers it is.
        token: its last token, the first of the answer.
        pending: the tokens to run next: those of its path that the cache lacks, and `token`.
    """

    index: int
    token: Token
    pending: list[int]


def draw_first_token(covers: Covers, cache: Cache, params: SamplingParams, generator: torch.Generator) -> FirstToken:
    """Draw a cover and leave the cache at the beginning that it shares with what was run."""
    return first_token_at(covers, cache, sample(covers.scores, params, generator), params.logprobs)


def first_token_at(covers: Covers, cache: Cache, index: int, top: int | None = None) -> FirstToken:
    """The first token by the cover `index`.

    Args:
        top: how many log-probabilities the token carries; None for none.
    """
    node, token = covers.cover.nodes[int(covers.nodes[index])], int(covers.tokens[index])
    common = shared_length(covers.held, node.path)
    if len(covers.held) > common:
        rewind(cache, len(covers.held) - common)
    continuation = Continuation(
        backed_off=covers.cover.backed_off,
        nodes=len(covers.cover.nodes),
        aligned=covers.aligned,
        prompt_ids=[*covers.context, *node.path],
        overlap=len(node.suffix),
    )
    pending = [*node.path[common:], token]
    if top is None:
        return FirstToken(index=index, token=Token(id=token, continuation=continuation), pending=pending)
    logprobs = covers.logprobs - covers.total
    best = logprobs.topk(min(top, len(logprobs)))
    likeliest: dict[int, float] = {}
    for at, logprob in zip(best.indices, best.values.tolist(), strict=True):
        if logprob > -math.inf:
            likeliest.setdefault(int(covers.tokens[at]), logprob)  # a token may end covers of two nodes
    return FirstToken(
        index=index,
        token=Token(id=token, logprob=float(logprobs[index]), top=likeliest, continuation=continuation),
        pending=pending,
    )
