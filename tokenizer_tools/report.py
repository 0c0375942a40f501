"""A tokenizer in numbers: its tokens, how it compresses a text, and what becomes of prompts that end inside a token."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, median, quantiles

from . import cuts as places
from .cover import cover, shared_length
from .cuts import Cut
from .vocabulary import Vocabulary

KINDS = (places.ANYWHERE, places.AFTER_SPACE, places.WORD_END)
"""The kinds of cuts that are reported."""

_LONGEST = 5
_EXAMPLES = 8
_COMPRESSED = 2**20  # characters of the text that compression is measured on


@dataclass(frozen=True, kw_only=True)
class Risk:
    """What happens to prompts that are cut off at one kind of place; shares are of all cuts.

    Attributes:
        kind: where the text was cut, one of `KINDS`.
        cuts: how many cuts.
        inside: share that fall inside a token of the uncut text.
        changed: share whose prompt's tokens do not begin the uncut text's tokens.
        deeper: share at which leaving out the prompt's last token does not help.
        depth_mean, depth_p95, depth_max: tokens to leave out until the rest begins the uncut text's tokens, where
            the prompt's tokens do not.
        nodes_mean, nodes_max: beginnings of covers.
        seconds: median time of finding the covers.
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
    """Attributes:
    kind: what sort of tokenizer it is.
    size: ids, special ones included.
    special: ids that are not text: special, added and unused.
    longest: the longest tokens.
    bytes_per_token: of the text's first million characters.
    risks: of every kind of cut that the text has.
    examples: cuts inside a token, of different tokens.
    """

    kind: str
    size: int
    special: int
    longest: tuple[bytes, ...]
    bytes_per_token: float
    risks: tuple[Risk, ...]
    examples: tuple[Example, ...]


def report(vocabulary: Vocabulary, text: str, *, cuts: int = 1000, seed: int = 0) -> Report:
    """What a tokenizer is like on `text`.

    Args:
        cuts: of every kind, each with 200 to 400 characters before it.
        seed: of their places.

    Raises:
        DataError: the text is too short to cut.
    """
    drawn = {kind: places.draw(vocabulary, text, kind, cuts, seed) for kind in KINDS}
    sample = text[:_COMPRESSED]
    tokens = sum(i not in vocabulary.special_ids for i in vocabulary.encode(sample))
    return Report(
        kind=vocabulary.kind,
        size=len(vocabulary.tokens),
        special=len(vocabulary.special_ids),
        longest=tuple(sorted({*vocabulary.tokens}, key=lambda token: (-len(token), token))[:_LONGEST]),
        bytes_per_token=len(sample.encode()) / tokens,
        risks=tuple(_risk(vocabulary, kind, found) for kind, found in drawn.items() if found),
        examples=_examples([cut for found in drawn.values() for cut in found]),
    )


def _risk(vocabulary: Vocabulary, kind: str, found: Sequence[Cut]) -> Risk:
    depths, nodes, seconds = [], [], []
    for cut in found:
        started = time.perf_counter()
        covers = cover(vocabulary, cut.prompt)
        seconds.append(time.perf_counter() - started)
        depths.append(_depth(covers.prompt, cut.ids))
        nodes.append(len(covers.nodes))
    changed = [depth for depth in depths if depth]
    return Risk(
        kind=kind,
        cuts=len(found),
        inside=mean(cut.overlap > 0 for cut in found),
        changed=len(changed) / len(found),
        deeper=sum(depth > 1 for depth in changed) / len(found),
        depth_mean=mean(changed) if changed else 0.0,
        depth_p95=quantiles(changed, n=20, method="inclusive")[-1] if len(changed) > 1 else float(sum(changed)),
        depth_max=max(changed, default=0),
        nodes_mean=mean(nodes),
        nodes_max=max(nodes),
        seconds=median(seconds),
    )


def _depth(prompt: Sequence[int], uncut: Sequence[int]) -> int:
    """Tokens of the prompt from the first one on that is not the uncut text's."""
    return len(prompt) - shared_length(prompt, uncut)


def _examples(found: Sequence[Cut]) -> tuple[Example, ...]:
    shown: dict[bytes, Example] = {}
    for cut in found:
        if cut.overlap and not cut.token.isspace():
            shown.setdefault(cut.token, Example(prompt_end=cut.prompt[-24:], token=cut.token))
    return tuple(shown.values())[:_EXAMPLES]
