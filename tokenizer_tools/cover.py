"""Every way in which a text that begins with a prompt may have been cut into tokens up to the prompt's end.

A *cover* of a prompt is a token sequence whose last token is the first to reach or pass its end. Every text that
begins with the prompt has exactly one cover as the beginning of its tokens, so the probabilities of covers add up
to that of the prompt, and drawing one with its probability is drawing from the model given the *text*, wherever the
tokenizer cut it. Covers of one beginning are kept together as a node: the tokens before the last one, and the bytes
of the prompt that the last token begins with.

Papers: arXiv 2410.09303, 2412.03719, 2506.14123. What a canonical beginning is: arXiv 2506.07956.
"""

from __future__ import annotations

import itertools
import unicodedata
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise

from ..errors import DataError, UnsupportedModel
from .characters import broken, split_character
from .vocabulary import Vocabulary, check_text

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
        cuts = vocabulary.piece_starts(complete + probe)
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


_PIECES_BACK = 3  # pieces at the end of a prompt that the probes see, at least
_WINDOW = 256  # bytes at its end among which they are looked for at first
_WIDEST = 4096  # bytes at its end that are looked at, at most: a longer run of letters or spaces is one piece anyway
_LONG = 512  # bytes of a piece that BPE does not cut into tokens anew for every node


@dataclass(frozen=True)
class Node:
    """Covers that share all tokens but the last.

    Attributes:
        path: their tokens between the cover's common prefix and the last one.
        suffix: the end of the prompt after `path`. Every token that is longer and begins with it makes a cover; if
            it is empty, the path is a cover itself, and any token may follow.
    """

    path: tuple[int, ...]
    suffix: bytes

    @property
    def aligned(self) -> bool:
        """True if the path ends where the prompt ends."""
        return not self.suffix


@dataclass(frozen=True, kw_only=True)
class Cover:
    """All covers of a prompt.

    Attributes:
        prompt: the tokens that the tokenizer makes of it.
        common_prefix: the tokens that all covers begin with, always a prefix of `prompt`.
        nodes: the first is the prompt's own end, unless its last character is cut and cannot be written.
        text: bytes of the prompt after its last special token.
    """

    prompt: tuple[int, ...]
    common_prefix: tuple[int, ...]
    nodes: tuple[Node, ...]
    text: bytes

    @property
    def only_aligned(self) -> bool:
        """True if no text that begins with the prompt is cut otherwise than the prompt itself."""
        return all(node.aligned for node in self.nodes) and len(self.nodes) == 1

    @property
    def backed_off(self) -> int:
        """Tokens of the prompt that some cover does not have."""
        return len(self.prompt) - len(self.common_prefix)


def cover(vocabulary: Vocabulary, prompt: str | bytes | Sequence[int]) -> Cover:
    """The covers of a prompt.

    Args:
        prompt: text, UTF-8 bytes that may end inside a character, or token ids. Only what follows the last
            special token, and the last id whose bytes are no character, is cut anew.

    Raises:
        DataError: bytes that are not UTF-8, or that end in half a character that has no token; text with half a
            surrogate pair.
        UnsupportedModel: a tokenizer that cuts characters, though its kind does not.
    """
    if isinstance(prompt, str):
        check_text(prompt)
        ids, partial = vocabulary.encode(prompt), b""
    elif isinstance(prompt, bytes):
        whole, partial = _split(prompt)
        ids = vocabulary.encode(whole.decode())
    else:
        ids, partial = list(prompt), b""
    text_start = _after_special_tokens(vocabulary, ids)
    if not isinstance(prompt, str | bytes):
        text_start = _after_broken(vocabulary, ids, text_start)
    text = vocabulary.text_bytes(ids[text_start:])
    if not isinstance(prompt, str | bytes):
        whole, partial = _split(text)
        ids, text = ids[:text_start] + vocabulary.encode_continuation(whole.decode()), whole
    elif _loses_end(prompt, text) if text else partial:
        text = _as_beginning(vocabulary, prompt if isinstance(prompt, str) else whole.decode())
        ids = ids[:text_start] + vocabulary.encode_continuation(text.decode())
    try:
        return _Search(vocabulary, ids, text_start, text + partial, partial).cover()
    except UnicodeDecodeError as error:
        raise UnsupportedModel(f"{vocabulary.name} cuts characters, which its kind of tokenizer does not") from error


def _split(data: bytes) -> tuple[bytes, bytes]:
    try:
        return split_character(data)
    except UnicodeDecodeError as error:
        raise DataError(f"the prompt is not UTF-8 at byte {error.start}: {error.reason}") from None


def _after_special_tokens(vocabulary: Vocabulary, ids: list[int]) -> int:
    """How many tokens there are up to the last special one."""
    return max((n + 1 for n, i in enumerate(ids) if vocabulary.is_special(i)), default=0)


def _after_broken(vocabulary: Vocabulary, ids: list[int], text_start: int) -> int:
    """How many tokens there are up to the last one, from `text_start` on, with bytes that are no character."""
    while runs := broken(vocabulary.text_bytes(ids[text_start:])):
        ends = accumulate(len(vocabulary.tokens[i]) for i in ids[text_start:])
        text_start += next(n for n, end in enumerate(ends, 1) if end >= runs[-1][1])
    return text_start


def _loses_end(prompt: str | bytes, text: bytes) -> bool:
    """True if a normalizer stripped white space from the end of the prompt."""
    end = prompt[-1:] if isinstance(prompt, str) else prompt[-1:].decode(errors="ignore")
    return end.isspace() and not text[-1:].isspace()


def _as_beginning(vocabulary: Vocabulary, text: str) -> bytes:
    """The bytes that `text` has where more follows: nothing is stripped from its end, and what the tokenizer puts
    before a text is there."""
    seen = []
    for probe in ("a", "0"):
        ids = vocabulary.encode(text + probe)
        seen.append(vocabulary.text_bytes(ids[_after_special_tokens(vocabulary, ids) :]))
    return seen[0][: shared_length(*seen)]


def shared_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the longest common beginning."""
    pairs = zip(first, second, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


class _Search:
    """One search for the covers of a prompt.

    Args:
        ids: its tokens, as the tokenizer makes them; without the half character that it may end in.
        text_start: how many of them come before the text that may be cut otherwise.
        text: the bytes of that text, `partial`, the half character, included.
    """

    def __init__(self, vocabulary: Vocabulary, ids: list[int], text_start: int, text: bytes, partial: bytes) -> None:
        self.vocabulary, self.ids, self.text_start, self.text, self.partial = vocabulary, ids, text_start, text, partial
        lengths = (len(vocabulary.tokens[i]) for i in ids[text_start:])
        self.borders = [0, *accumulate(lengths)]  # byte offsets at which the tokens of `text` begin and end
        self.kept, self.start = text_start, 0  # tokens that all covers share for certain, and the offset after them

    def cover(self) -> Cover:
        if not self.text:
            return Cover(prompt=tuple(self.ids), common_prefix=tuple(self.ids), nodes=(Node((), b""),), text=b"")
        self._narrow()
        found: dict[Node, None] = {}
        for hypothesis in hypotheses(self.vocabulary, self.text[self.start :]):
            written = (node for node in self._nodes(hypothesis) if self.vocabulary.has_rows(node.path))
            found.update(dict.fromkeys(written))
        nodes = sorted(found, key=lambda node: not node.aligned)  # stable: the prompt's own end stays first
        if not nodes:
            raise DataError(f"{self.vocabulary.name} has no tokens for a character that begins with {self.partial!r}")
        common_prefix = nodes[0].path
        for node in nodes[1:]:
            common_prefix = common_prefix[: shared_length(common_prefix, node.path)]
        kept = tuple(self.ids[: self.kept])
        return Cover(
            prompt=kept + nodes[0].path if nodes[0].aligned else tuple(self.ids),
            common_prefix=kept + common_prefix,
            nodes=tuple(Node(node.path[len(common_prefix) :], node.suffix) for node in nodes),
            text=self.text,
        )

    def _narrow(self) -> None:
        """Move `start` to a border of pieces near the end that what follows the prompt cannot move."""
        width, whole = _WINDOW, len(self.text) - len(self.partial)
        while width < whole:
            first = bisect_right(self.borders, whole - width) - 1
            while first and self.text[self.borders[first]] & 0xC0 == 0x80:
                first -= 1  # a token that begins inside a character
            if self._narrow_from(first):
                return
            if width >= _WIDEST:
                self.kept, self.start = self.text_start + first, self.borders[first]
                return
            width *= 4
        self._narrow_from(0)

    def _narrow_from(self, first: int) -> bool:
        """Look for the border after the first `first` tokens; False if there is none, or if the text from there is
        split otherwise alone than in its place."""
        window = self.text[self.borders[first] : len(self.text) - len(self.partial)].decode()
        cuts = self.vocabulary.piece_starts(window)
        firm = [cut for cut in cuts[:-_PIECES_BACK] if _is_firm(window[cut - 1], window[cut])]
        if not firm:
            return False
        start = self.borders[first] + len(window[: firm[-1]].encode())
        n = bisect_left(self.borders, start)
        if (
            self.borders[n] != start
            or self.vocabulary.encode_continuation(window[firm[-1] :]) != self.ids[self.text_start + n :]
        ):
            return False
        self.kept, self.start = self.text_start + n, start
        return True

    def _nodes(self, hypothesis: Hypothesis) -> Iterator[Node]:
        """The nodes of a text that is split into pieces in this way; the last piece goes on after the prompt."""
        borders = [self.start, *(self.start + cut for cut in hypothesis.cuts)]
        before = tuple(i for a, b in pairwise(borders) for i in self.vocabulary.encode_piece(self.text[a:b]))
        piece = _OpenPiece(self, borders[-1])
        for path in piece.ends():
            yield Node(before + path, b"")
        for begin in piece.begins():
            path = piece.path(begin)
            if self._continues(path, self.text[begin:], hypothesis.next_bytes):
                yield Node(before + path, self.text[begin:])

    def _continues(self, path: tuple[int, ...], suffix: bytes, next_bytes: frozenset[int]) -> bool:
        """True if a token that is longer than `suffix` can follow the path in the tokens of a text's piece."""
        last = path[-1] if path else None
        if last is not None and not self.vocabulary.byte_level and not _is_text(self.vocabulary.tokens[last]):
            return True  # a byte of a character that has no token merges with nothing
        return self.vocabulary.can_extend(last, suffix, next_bytes)


class _OpenPiece:
    """The piece that begins at byte `start` and goes on after the prompt."""

    def __init__(self, search: _Search, start: int) -> None:
        self.vocabulary, self.start = search.vocabulary, start
        self.text, self.partial = search.text, search.partial
        self.tokens: list[int] | None = None  # of a long piece
        if len(self.text) - start > _LONG and not self.vocabulary.unigram:
            n = bisect_left(search.borders, start)
            own = search.borders[n] == start
            self.tokens = (
                search.ids[search.text_start + n :] if own else self.vocabulary.encode_piece_start(self.text[start:])
            )
            self.borders = [
                start,
                *(start + end for end in accumulate(len(self.vocabulary.tokens[i]) for i in self.tokens)),
            ]

    def ends(self) -> Iterator[tuple[int, ...]]:
        """Token sequences of the piece up to the prompt's end: where the piece may end there, and where it goes on."""
        stop = len(self.text)
        if self.partial and not self.vocabulary.byte_level:
            single = self.vocabulary.byte_tokens(self.partial)
            if single is not None:
                yield (*self.path(stop - len(self.partial)), *single)
            return
        if self.tokens is None:
            yield tuple(self.vocabulary.encode_piece(self.text[self.start :]))
        yield self.path(stop)

    def begins(self) -> Iterator[int]:
        """Offsets in the piece at which a token may begin that is longer than the rest of the prompt."""
        stop = len(self.text)
        for begin in range(max(self.start, stop - self.vocabulary.trie.longest + 1), stop):
            if self.vocabulary.trie.extends(self.text[begin:]):
                yield begin

    def path(self, stop: int) -> tuple[int, ...]:
        """The tokens of the piece up to `stop`, where one of them ends there.

        A long piece keeps the tokens it has, up to one at a distance: a token sequence is what BPE makes of its bytes
        if every two neighbours are.
        """
        if self.tokens is None:
            return tuple(self.vocabulary.encode_piece_start(self.text[self.start : stop]))
        n = bisect_right(self.borders, max(self.start, stop - 2 * self.vocabulary.trie.longest)) - 1
        while n > 0:
            rest = self.vocabulary.encode_piece_start(self.text[self.borders[n] : stop]) if self._whole(n) else []
            if rest and self._neighbours(self.tokens[n - 1], rest[0]):
                return (*self.tokens[:n], *rest)
            n -= 1
        return tuple(self.vocabulary.encode_piece_start(self.text[self.start : stop]))

    def _whole(self, n: int) -> bool:
        return self.vocabulary.byte_level or self.text[self.borders[n]] & 0xC0 != 0x80

    def _neighbours(self, first: int, second: int) -> bool:
        data = self.vocabulary.tokens[first] + self.vocabulary.tokens[second]
        return (self.vocabulary.byte_level or _is_text(data)) and self.vocabulary.encode_piece_start(data) == [
            first,
            second,
        ]


def _is_firm(before: str, after: str) -> bool:
    """True if a border of pieces between two characters does not depend on what follows farther on: not inside white
    space, whose last character may join a word, nor inside digits, which may be grouped from the right."""
    return not before.isspace() and not (before.isnumeric() and after.isnumeric())


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
