"""How a tokenizer may split the end of a text, once more text arrives.

A pre-tokenizer looks ahead: two spaces are one piece at the end of a text, and two before a letter; digits may be
grouped from the right; `'r` is two pieces, `'re` is one. Instead of rules for each, the text is split with many
short continuations, and the different results are kept.
"""

from __future__ import annotations

import itertools
import unicodedata
from collections import defaultdict
from dataclasses import dataclass
from functools import cache

from .characters import split_character
from .vocabulary import Vocabulary

PROBES = (
    *("", "a", "A", " a", " A", "Aa", "aA", " ", "  ", "0", "00", "000", " 0", "0.", "0a"),
    *("s", "t", "d", "m", "e", "l", "re", "ve", "ll", "S", "'", "'s", "’", '"', ".", ",", "-", "_", "(", ")"),
    *("/", "=", "<", "#", "!", " (", "\n", "\n\n", "\na", "\r\n", "\t", " \n", "中", "の", "한", "。", "é"),
    *("\N{COMBINING ACUTE ACCENT}", "я", "😀", "²", "\N{IDEOGRAPHIC SPACE}", "\N{ZERO WIDTH JOINER}"),
)
_AFTER_CHARACTER = ("", "a", "0", " ", ".")
_MOST_COMPLETIONS = 4096  # of a character cut inside; more are taken at equal steps


@dataclass(frozen=True, kw_only=True)
class Hypothesis:
    """One way in which the end of a text may be split.

    Attributes:
        cuts: where pieces begin, as byte offsets inside the text, without 0.
        next_bytes: the bytes that the text may go on with in its last piece.
    """

    cuts: tuple[int, ...]
    next_bytes: frozenset[int]


def hypotheses(vocabulary: Vocabulary, text: bytes) -> list[Hypothesis]:
    """The different ways in which `text` is split by some continuation; first the one where it ends.

    Args:
        text: begins where a piece begins; may end inside a character.
    """
    whole, partial = split_character(text)
    complete = whole.decode()
    if partial:
        probes = [character + probe for character in completions(partial) for probe in _AFTER_CHARACTER]
    else:
        probes = list(PROBES)
    offsets = [0, *itertools.accumulate(len(character.encode()) for character in complete)]
    found: dict[tuple[int, ...], set[str]] = {}
    for probe in probes:
        cuts = vocabulary.cuts(complete + probe)
        goes_on = len(complete) not in cuts
        inside = tuple(offsets[cut] for cut in cuts if cut < len(offsets) and offsets[cut] < len(text))
        found.setdefault(inside, set()).update(_kind(probe[0]) for _ in probe[:1] if goes_on)
    return [
        Hypothesis(cuts=cuts, next_bytes=frozenset(range(256)) if partial else _first_bytes(frozenset(kinds)))
        for cuts, kinds in found.items()
    ]


def _kind(character: str) -> str:
    """What pre-tokenizers tell apart by a single character."""
    return character if character in " \t\n\r" else unicodedata.category(character)[0]


@cache
def _first_bytes(kinds: frozenset[str]) -> frozenset[int]:
    """The bytes with which a character of one of `kinds` may begin."""
    return frozenset(byte for kind in kinds for byte in _by_kind()[kind])


@cache
def _by_kind() -> dict[str, set[int]]:
    found: dict[str, set[int]] = defaultdict(set)
    for code in itertools.chain(range(0xD800), range(0xE000, 0x10000), range(0x10000, 0x110000, 16)):
        found[_kind(chr(code))].add(chr(code).encode()[0])
    return found


@cache
def completions(partial: bytes) -> tuple[str, ...]:
    """Characters that begin with the bytes `partial`, one of each Unicode category."""
    missing = (2 if partial[0] < 0xE0 else 3 if partial[0] < 0xF0 else 4) - len(partial)
    tails = itertools.product(range(0x80, 0xC0), repeat=missing)
    step = max(1, 64**missing // _MOST_COMPLETIONS | 1)  # odd, so that every last byte occurs
    found: dict[str, str] = {}
    for tail in itertools.islice(tails, 0, None, step):
        character = (partial + bytes(tail)).decode(errors="ignore")
        if len(character) == 1:
            found.setdefault(unicodedata.category(character), character)
    return tuple(found.values())
