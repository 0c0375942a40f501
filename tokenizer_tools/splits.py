"""The ways in which the end of a text can be split into pieces, by the text that may follow it."""

from __future__ import annotations

import itertools
import unicodedata
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

from .characters import split_character
from .vocabulary import Vocabulary

CONTINUATIONS = (
    *("", "a", "A", " a", " A", "Aa", "aA", " ", "  ", "0", "00", "000", " 0", "0.", "0a"),
    *("s", "t", "d", "m", "e", "l", "re", "ve", "ll", "S", "'", "'s", "’", '"', ".", ",", "-", "_", "(", ")"),
    *("/", "=", "<", "#", "!", " (", "\n", "\n\n", "\na", "\r\n", "\t", " \n", "中", "の", "한", "。", "é"),
    *("\N{COMBINING ACUTE ACCENT}", "я", "😀", "²", "\N{IDEOGRAPHIC SPACE}", "\N{ZERO WIDTH JOINER}"),
)
_AFTER_CHARACTER = ("", "a", "0", " ", ".")
_MOST_COMPLETIONS = 4096  # of a part of a character; a sample at equal steps if there are more


@dataclass(frozen=True, kw_only=True)
class Split:
    """One way in which the end of a text can be split into pieces.

    Attributes:
        piece_starts: byte offsets in the text, without 0.
        next_bytes: the bytes with which the last piece can continue after the text.
    """

    piece_starts: tuple[int, ...]
    next_bytes: frozenset[int]


def possible_splits(vocabulary: Vocabulary, text: bytes) -> list[Split]:
    """The different splits of `text` under all continuations. The first one is that without a continuation.

    Args:
        text: starts where a piece starts; can end inside a character.
    """
    whole, partial = split_character(text)
    complete = whole.decode()
    if partial:
        probes = [character + probe for character in completions(partial) for probe in _AFTER_CHARACTER]
    else:
        probes = list(CONTINUATIONS)
    offsets = [0, *accumulate(len(character.encode()) for character in complete)]
    kinds_by_starts: dict[tuple[int, ...], set[str]] = {}
    for probe in probes:
        starts = vocabulary.piece_starts(complete + probe)
        continues = len(complete) not in starts
        inside = tuple(offsets[at] for at in starts if at < len(offsets) and offsets[at] < len(text))
        kinds_by_starts.setdefault(inside, set()).update(_kind(probe[0]) for _ in probe[:1] if continues)
    return [
        Split(piece_starts=starts, next_bytes=frozenset(range(256)) if partial else _first_bytes(frozenset(kinds)))
        for starts, kinds in kinds_by_starts.items()
    ]


def _kind(character: str) -> str:
    """The class of a character that pre-tokenizers distinguish."""
    return character if character in " \t\n\r" else unicodedata.category(character)[0]


@cache
def _first_bytes(kinds: frozenset[str]) -> frozenset[int]:
    """The first bytes of the characters of `kinds`."""
    return frozenset(byte for kind in kinds for byte in _first_bytes_by_kind()[kind])


@cache
def _first_bytes_by_kind() -> dict[str, set[int]]:
    by_kind: dict[str, set[int]] = defaultdict(set)
    for code in itertools.chain(range(0xD800), range(0xE000, 0x10000), range(0x10000, 0x110000, 16)):
        by_kind[_kind(chr(code))].add(chr(code).encode()[0])
    return by_kind


@cache
def completions(partial: bytes) -> tuple[str, ...]:
    """Characters that start with the bytes `partial`, one of each Unicode category."""
    missing = (2 if partial[0] < 0xE0 else 3 if partial[0] < 0xF0 else 4) - len(partial)
    tails = itertools.product(range(0x80, 0xC0), repeat=missing)
    step = max(1, 64**missing // _MOST_COMPLETIONS | 1)  # odd, so that every last byte occurs
    by_category: dict[str, str] = {}
    for tail in itertools.islice(tails, 0, None, step):
        character = (partial + bytes(tail)).decode(errors="ignore")
        if len(character) == 1:
            by_category.setdefault(unicodedata.category(character), character)
    return tuple(by_category.values())
