"""A tokenizer in numbers: its tokens, its compression of a text, and the effect of prompts that end inside a token."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, median, quantiles

from ..errors import DataError
from . import cuts as prompt_cuts
from .cover import cover, shared_length
from .cuts import Cut
from .vocabulary import Vocabulary

KINDS = (prompt_cuts.ANYWHERE, prompt_cuts.AFTER_SPACE, prompt_cuts.WORD_END)
"""The kinds of cuts in a report."""

_LONGEST_TOKENS = 5  # in a report
_EXAMPLES = 8
_COMPRESSED = 2**20  # characters of the text on which the compression is measured


@dataclass(frozen=True, kw_only=True)
class Risk:
    """The effect of cutting prompts at one kind of place. Shares are of all cuts.

    Attributes:
        kind: the kind of place, one of `KINDS`.
        cuts: the number of cuts.
        inside: share of cuts inside a token of the uncut text.
        changed: share of prompts whose tokens are not a prefix of the uncut text's tokens.
        deeper: share of prompts for which this is still so without their last token.
        depth_mean, depth_p95, depth_max: among the changed prompts, the number of last tokens to remove until the
            rest is a prefix of the uncut text's tokens.
        nodes_mean, nodes_max: the number of nodes of the covers.
        seconds: median time to find the covers.
    """

    kind: str
    cuts: int
    inside: float
    changed: float
    deeper: float
    depth_mean: float
    depth_p95: float
    depth_max: int
    nodes_mean: float
    nodes_max: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Example:
    """A prompt that ends inside a token: its last characters, and the token of the uncut text."""

    prompt_end: str
    token: bytes


@dataclass(frozen=True, kw_only=True)
class Report:
    """A tokenizer in numbers.

    Attributes:
        kind: kind of the tokenizer.
        size: the number of ids, including special ones.
        special: the number of ids that are not text: special, added and unused.
        longest: the longest tokens.
        bytes_per_token: in the text's first 2^20 characters.
        risks: one for every kind of cut that the text has.
        examples: cuts inside a token, each with another token.
    """

    kind: str
    size: int
    special: int
    longest: tuple[bytes, ...]
    bytes_per_token: float
    risks: tuple[Risk, ...]
    examples: tuple[Example, ...]


def report(vocabulary: Vocabulary, text: str, *, cuts: int = 1000, seed: int = 0) -> Report:
    """The numbers of a tokenizer on `text`.

    Args:
        cuts: the number of cuts of each kind. The prompt of a cut has 200 to 400 characters.
        seed: seed of their places.

    Raises:
        DataError: the text is too short to cut, or all of it is unknown to the tokenizer.
    """
    drawn = {kind: prompt_cuts.draw(vocabulary, text, kind, cuts, seed) for kind in KINDS}
    sample = text[:_COMPRESSED]
    tokens = sum(i not in vocabulary.special_ids for i in vocabulary.encode(sample))
    if not tokens:
        raise DataError(f"{vocabulary.name} knows no character of this text; give a text that it has tokens for")
    return Report(
        kind=vocabulary.kind,
        size=len(vocabulary.tokens),
        special=len(vocabulary.special_ids),
        longest=tuple(sorted({*vocabulary.tokens}, key=lambda token: (-len(token), token))[:_LONGEST_TOKENS]),
        bytes_per_token=len(sample.encode()) / tokens,
        risks=tuple(_risk(vocabulary, kind, of_kind) for kind, of_kind in drawn.items() if of_kind),
        examples=_examples([cut for of_kind in drawn.values() for cut in of_kind]),
    )


def _risk(vocabulary: Vocabulary, kind: str, cuts: Sequence[Cut]) -> Risk:
    depths, nodes, seconds = [], [], []
    for cut in cuts:
        started = time.perf_counter()
        covers = cover(vocabulary, cut.prompt)
        seconds.append(time.perf_counter() - started)
        depths.append(_depth(covers.prompt, cut.ids))
        nodes.append(len(covers.nodes))
    changed = [depth for depth in depths if depth]
    return Risk(
        kind=kind,
        cuts=len(cuts),
        inside=mean(cut.overlap > 0 for cut in cuts),
        changed=len(changed) / len(cuts),
        deeper=sum(depth > 1 for depth in changed) / len(cuts),
        depth_mean=mean(changed) if changed else 0.0,
        depth_p95=quantiles(changed, n=20, method="inclusive")[-1] if len(changed) > 1 else float(sum(changed)),
        depth_max=max(changed, default=0),
        nodes_mean=mean(nodes),
        nodes_max=max(nodes),
        seconds=median(seconds),
    )


def _depth(prompt: Sequence[int], uncut: Sequence[int]) -> int:
    """The number of tokens of the prompt from the first one that differs from the uncut text's."""
    return len(prompt) - shared_length(prompt, uncut)


def _examples(cuts: Sequence[Cut]) -> tuple[Example, ...]:
    by_token: dict[bytes, Example] = {}
    for cut in cuts:
        if cut.overlap and not cut.token.isspace():
            by_token.setdefault(cut.token, Example(prompt_end=cut.prompt[-24:], token=cut.token))
    return tuple(by_token.values())[:_EXAMPLES]
