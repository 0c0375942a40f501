"""Token healing: the first token after a prompt that may end inside a token, drawn among all covers of the prompt.

The probability of a cover is the product of those of its tokens. All covers together are the distribution of the text
that follows the prompt's *text*. After the first token, decoding is ordinary.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from ..errors import ConfigError, Setting
from ..tokenizer_tools.cover import Cover, shared_length
from ..tokenizer_tools.vocabularies import vocabulary
from ..tokenizer_tools.vocabulary import Vocabulary
from .cache import can_rewind, new_cache, rewind, tokens_read
from .completion import Token, TokenHealing
from .hf_model import input_device, stop_ids
from .prefill import Progress, prefill, score
from .prompt import Prompt
from .runners.runner import Path, Runner, token_rows
from .runners.transformers import TransformersRunner
from .sampling import ResolvedParams, SamplingParams, not_finite, penalize_repetition, random_source, resolved, sample

END = 256  # the index of "the text ends here" among next bytes


@dataclass(frozen=True, kw_only=True)
class Covers:
    """The covers of a prompt with their probabilities.

    Attributes:
        context: the certain tokens as they were read, or a start token if there are none.
        nodes, tokens: the node of every cover, and its last token, int64 [covers].
        scores: log-probabilities given `context` with the repetition penalty, which are sampled from.
        logprobs: log-probabilities given `context`, float32 [covers], nats.
        cached_path: the tokens that the cache holds after `context`.
    """

    cover: Cover
    context: list[int]
    nodes: Tensor
    tokens: Tensor
    scores: Tensor
    logprobs: Tensor
    cached_path: Path

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
        """Log-probabilities of the byte after the prompt, float32 [257], nats. Index 256 is the end of the text."""
        skips = [len(node.suffix) for node in self.cover.nodes]
        tokens, special_ids = vocabulary.tokens, vocabulary.special_ids
        next_bytes = torch.tensor(
            [
                # a model may have more logits than there are tokens
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
    """Run the certain tokens and the paths of a cover, and compute the probability of every cover.

    Args:
        start: token to read first if no token is certain.
        cache: may hold the beginning of the prompt, or more of it. Afterwards it holds `Covers.context` and
            `Covers.cached_path`.
        penalty: the repetition penalty of `scores`.
        progress: called after each step that reads the certain tokens.

    Raises:
        ConfigError: no token is certain and there is no start token.
        PatchError: the cache holds more than the certain tokens and cannot be rewound.
        UnsupportedModel: a logit is NaN or infinite.
    """
    context = list(cover.common_prefix) or ([] if start is None else [start])
    if not context:
        raise ConfigError(
            f"no token of {cover.text.decode(errors='replace')!r} is certain and this tokenizer has no start token to "
            "read before it; give a longer prompt, or set ",
            Setting("continuation", "off"),
        )
    leaves = _leaves([node.path for node in cover.nodes])
    if (excess := tokens_read(cache) - len(context) + 1) > 0:
        rewind(cache, excess)
    rewinds = can_rewind(cache, max(map(len, leaves), default=0))
    cached_path = leaves.pop(0) if rewinds else ()
    rows = prefill(
        runner, [*context, *cached_path][tokens_read(cache) :], cache, progress, logits_to_keep=len(cached_path) + 1
    )
    path_logits, cached_path = _path_logits(runner, rows.float(), cached_path, leaves, cache, rewinds)
    logits = {path: row[..., : runner.vocabulary_size] for path, row in path_logits.items()}
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
    if not logprobs.max().isfinite():
        raise not_finite(runner.hf)
    return Covers(
        cover=cover,
        context=context,
        nodes=nodes,
        tokens=tokens,
        scores=scores,
        logprobs=logprobs,
        cached_path=cached_path,
    )


def text_logprob(
    runner: Runner, cover: Cover, start: int | None, first: int, cache: Cache, vocabulary: Vocabulary
) -> float:
    """Log-probability that a text begins with the prompt, given the first `first` of its certain tokens, nats.

    Args:
        start: token to read first, not counted in `first`. None if `first` is above 0.
        cache: an empty one.
    """
    context = [*([] if start is None else [start]), *cover.common_prefix]
    first += start is not None
    certain = float(score(runner, context, first, cache).double().sum()) if len(context) > first else 0.0
    return certain + weigh(runner, replace(cover, common_prefix=tuple(context)), None, cache, vocabulary).total


def _leaves(paths: Sequence[Path]) -> list[Path]:
    """The paths that no other path extends, the longest first."""
    extended = {path[:count] for path in paths for count in range(len(path))}
    return sorted((path for path in dict.fromkeys(paths) if path not in extended), key=len, reverse=True)


def _path_logits(
    runner: Runner, rows: Tensor, cached: Path, leaves: list[Path], cache: Cache, rewinds: bool
) -> tuple[dict[Path, Tensor], Path]:
    """Float32 logits [V] after every prefix of the paths, and the path that the cache holds afterwards.

    Args:
        rows: the logits after the context and after each token of `cached`, which the cache holds.
        leaves: the other paths, without those that are prefixes of them.
        rewinds: whether the cache can go back by any of the paths.
    """
    logits = {cached[:k]: row for k, row in enumerate(rows)}
    if rewinds and leaves and runner.runs_trees and (len(leaves) > 1 or runner.is_compiled):
        rewind(cache, len(cached))
        paths = list(dict.fromkeys(leaf[: k + 1] for leaf in leaves for k in range(len(leaf))))
        rows = runner.tree(paths, cache).float()
        return logits | dict(zip(paths, rows, strict=True)), ()
    for leaf in leaves:
        common = shared_length(cached, leaf)
        if rewinds:
            rewind(cache, len(cached) - common)
            cached, branch = leaf, cache
        else:
            branch = copy.deepcopy(cache)
        rows = runner.forward(list(leaf[common:]), branch, logits_to_keep=len(leaf) - common).float()
        logits.update({leaf[: common + k + 1]: row for k, row in enumerate(rows)})
    return logits, cached


@dataclass(frozen=True, kw_only=True)
class FirstToken:
    """The first token after a prompt, drawn among its covers.

    Attributes:
        index: that of the cover.
        token: the last token of the cover, which is the first of the answer.
        pending: tokens to run next: those of the cover's path that the cache lacks, and `token`.
    """

    index: int
    token: Token
    pending: list[int]


def draw_first_token(covers: Covers, cache: Cache, params: ResolvedParams, generator: torch.Generator) -> FirstToken:
    """Draw a cover. The cache is rewound to the tokens that it shares with the cover."""
    return first_token_at(covers, cache, int(sample(covers.scores, params, generator)), params.logprobs)


def first_token_at(covers: Covers, cache: Cache, index: int, top: int | None = None) -> FirstToken:
    """The first token of the cover `index`.

    Args:
        top: number of likeliest tokens whose log-probabilities are returned with it; None for none.
    """
    node, token = covers.cover.nodes[int(covers.nodes[index])], int(covers.tokens[index])
    common = shared_length(covers.cached_path, node.path)
    if len(covers.cached_path) > common:
        rewind(cache, len(covers.cached_path) - common)
    healing = TokenHealing(
        backed_off=covers.cover.backed_off,
        nodes=len(covers.cover.nodes),
        aligned=covers.aligned,
        prompt_ids=[*covers.context, *node.path],
        overlap=len(node.suffix),
    )
    pending = [*node.path[common:], token]
    if top is None:
        return FirstToken(index=index, token=Token(id=token, healing=healing), pending=pending)
    logprobs = covers.logprobs - covers.total
    best = logprobs.topk(min(top, len(logprobs)))
    likeliest: dict[int, float] = {}
    for at, logprob in zip(best.indices, best.values.tolist(), strict=True):
        if logprob > -math.inf:
            likeliest.setdefault(int(covers.tokens[at]), logprob)  # a token may end the covers of two nodes
    return FirstToken(
        index=index,
        token=Token(id=token, logprob=float(logprobs[index]), top=likeliest, healing=healing),
        pending=pending,
    )


@dataclass(frozen=True, kw_only=True)
class Healed:
    """Prompts that may end inside a token, with their first new token drawn.

    Attributes:
        input_ids, attention_mask: int64 [prompts, length], padded on the left: arguments of `hf_model.generate`.
        healings: what was done at the end of each prompt; None if nothing was.
        ended: for each prompt, whether the token that was drawn ends its text. `hf_model.generate` continues anyway.
    """

    input_ids: Tensor
    attention_mask: Tensor
    healings: list[TokenHealing | None]
    ended: list[bool]
    prompts: list[Prompt]
    vocabulary: Vocabulary

    def texts(self, output_ids: Tensor) -> list[str]:
        """What follows each prompt in the output of `hf_model.generate`, [prompts, length or more]."""
        texts = []
        rows = zip(self.prompts, self.healings, self.ended, output_ids.tolist(), strict=True)
        for prompt, healing, ended, row in rows:
            if ended:
                texts.append("")
                continue
            is_drawn = healing is not None  # the last of `input_ids` is the first new token
            new = row[self.input_ids.shape[1] - is_drawn :]
            stream = prompt.text_stream(self.vocabulary)
            skips = [healing.overlap if healing else 0, *[0] * len(new)]
            pieces = [stream.push(token, skip) for token, skip in zip(new, skips, strict=False)]
            texts.append("".join(pieces) + stream.finish())
        return texts


def heal(
    hf_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: str | bytes | Sequence[str | bytes],
    params: SamplingParams | None = None,
    *,
    special_tokens: bool = False,
) -> Healed:
    """Make prompts that may end inside a token ready for transformers' own `generate`.

        healed = rw.heal(hf_model, tokenizer, "import nump")
        output = hf_model.generate(healed.input_ids, attention_mask=healed.attention_mask)
        print(healed.texts(output)[0])

    The first new token is drawn among the covers of the prompt, as `Model.generate` does. The model may be patched.

    Args:
        params: how to draw the first token. `hf_model.generate` draws the others with its own settings.
        special_tokens: whether a name such as `<|im_start|>` in a prompt stands for the special token.

    Raises:
        ConfigError: there are no prompts, or one is empty and the tokenizer has no start token.
        DataError: a prompt is not UTF-8, or holds half a surrogate pair, or a token that the model does not have.
    """
    if not prompts and not isinstance(prompts, str | bytes):
        raise ConfigError("prompts is empty; give at least one")
    params = resolved(params or SamplingParams(), hf_model.generation_config)
    tokens = vocabulary(tokenizer, special_tokens=special_tokens, rows=token_rows(hf_model))
    device = input_device(hf_model)
    read = [
        Prompt.read(prompt, tokenizer, tokens, params.continuation)
        for prompt in ([prompts] if isinstance(prompts, str | bytes) else prompts)
    ]
    rows: list[list[int]] = []
    healings: list[TokenHealing | None] = []
    ended: list[bool] = []
    ends, runner = stop_ids(hf_model, tokenizer), TransformersRunner(hf_model)
    for prompt in read:
        if (cover := prompt.cover_to_weigh) is None:
            rows.append(prompt.ids)
            healings.append(None)
            ended.append(False)
            continue
        cache = new_cache(hf_model.config, len(prompt.ids))
        with torch.inference_mode():
            covers = weigh(runner, cover, prompt.start, cache, tokens, params.repetition_penalty)
            first = draw_first_token(covers, cache, params, random_source(params, device)).token
        assert first.healing is not None
        rows.append([*first.healing.prompt_ids, first.id])
        healings.append(first.healing)
        ended.append(first.id in ends)
    length = max(map(len, rows))
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    return Healed(
        input_ids=torch.tensor([[padding] * (length - len(row)) + row for row in rows], device=device),
        attention_mask=torch.tensor([[0] * (length - len(r)) + [1] * len(r) for r in rows], device=device),
        healings=healings,
        ended=ended,
        prompts=read,
        vocabulary=tokens,
    )
