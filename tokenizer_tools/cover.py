"""Covers: all token sequences that a text can start with if it begins with a given prompt.

A *cover* of a prompt is a token sequence whose last token is the first to reach or pass the prompt's end. The tokens of
every text that begins with the prompt start with exactly one cover. So the probabilities of the covers add up to that
of the prompt, and a cover drawn with its probability is a sample from the model given the *text* of the prompt, which
does not depend on the prompt's own tokens. Covers that share all tokens but the last form a node: these tokens, and the
bytes of the prompt that the last token starts with.

Which covers exist depends on the text after the prompt, because a pre-tokenizer looks ahead. Two spaces are one piece
at the end of a text and two before a letter, digits can be grouped from the right, `'r` is two pieces and `'re` is
one. There are no rules for these cases here: the text is split with many short continuations, and every different
result counts.

Papers: arXiv 2410.09303, 2412.03719, 2506.14123. Definition of a canonical start: arXiv 2506.07956.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from ..errors import DataError, UnsupportedModel
from .characters import invalid_runs, split_character
from .splits import Split, possible_splits
from .vocabulary import Vocabulary, check_text

_PIECES_BACK = 3  # the least number of pieces at the end of a prompt that are split with continuations
_FIRST_WINDOW = 256  # bytes at the end of a prompt in which these pieces are searched first
_LARGEST_WINDOW = 4096  # bytes; a longer run of letters or spaces is one piece anyway
_LONG_PIECE = 512  # bytes; a longer piece is not tokenized again for every node


@dataclass(frozen=True)
class Node:
    """Covers that share all tokens but the last.

    Attributes:
        path: their tokens between `Cover.common_prefix` and the last token.
        suffix: the end of the prompt after `path`. Every longer token that starts with it makes a cover. If it is
            empty, the path itself is a cover, and any token can follow.
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
        prompt: the tokens that the tokenizer gives for it.
        common_prefix: the tokens that all covers start with, a prefix of `prompt`.
        nodes: the first one ends where the prompt ends, unless the prompt ends in a part of a character that has no
            tokens.
        text: the bytes of the prompt after its last special token.
    """

    prompt: tuple[int, ...]
    common_prefix: tuple[int, ...]
    nodes: tuple[Node, ...]
    text: bytes

    @property
    def only_aligned(self) -> bool:
        """True if every text that begins with the prompt starts with the prompt's own tokens."""
        return all(node.aligned for node in self.nodes) and len(self.nodes) == 1

    @property
    def backed_off(self) -> int:
        """The number of the prompt's last tokens that not all covers have."""
        return len(self.prompt) - len(self.common_prefix)


def cover(vocabulary: Vocabulary, prompt: str | bytes | Sequence[int]) -> Cover:
    """The covers of a prompt.

    Args:
        prompt: text, UTF-8 bytes that can end inside a character, or token ids. Only the text after the last special
            token, and after the last id with an invalid character, can have other tokens in a cover.

    Raises:
        DataError: bytes that are not UTF-8, or that end in a part of a character without tokens; text with half a
            surrogate pair.
        UnsupportedModel: a tokenizer that splits characters although its kind does not.
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
        text_start = _after_invalid(vocabulary, ids, text_start)
    text = vocabulary.text_bytes(ids[text_start:])
    if not isinstance(prompt, str | bytes):
        whole, partial = _split(text)
        ids, text = ids[:text_start] + vocabulary.encode_continuation(whole.decode()), whole
    elif _loses_end(prompt, text) if text else partial:
        text = _as_start(vocabulary, prompt if isinstance(prompt, str) else whole.decode())
        ids = ids[:text_start] + vocabulary.encode_continuation(text.decode())
    try:
        return _Search(vocabulary, ids, text_start, text + partial, partial).cover()
    except UnicodeDecodeError as error:
        raise UnsupportedModel(f"{vocabulary.name} splits characters, unlike its kind of tokenizer") from error


def _split(data: bytes) -> tuple[bytes, bytes]:
    try:
        return split_character(data)
    except UnicodeDecodeError as error:
        raise DataError(f"the prompt is not UTF-8 at byte {error.start}: {error.reason}") from None


def _after_special_tokens(vocabulary: Vocabulary, ids: list[int]) -> int:
    """The number of tokens up to the last special one."""
    return max((n + 1 for n, i in enumerate(ids) if vocabulary.is_special(i)), default=0)


def _after_invalid(vocabulary: Vocabulary, ids: list[int], text_start: int) -> int:
    """The number of tokens up to the last one from `text_start` on with bytes that are not UTF-8."""
    while runs := invalid_runs(vocabulary.text_bytes(ids[text_start:])):
        ends = accumulate(len(vocabulary.tokens[i]) for i in ids[text_start:])
        text_start += next(n for n, end in enumerate(ends, 1) if end >= runs[-1][1])
    return text_start


def _loses_end(prompt: str | bytes, text: bytes) -> bool:
    """True if a normalizer has removed white space from the end of the prompt."""
    end = prompt[-1:] if isinstance(prompt, str) else prompt[-1:].decode(errors="ignore")
    return end.isspace() and not text[-1:].isspace()


def _as_start(vocabulary: Vocabulary, text: str) -> bytes:
    """The bytes of `text` at the start of a longer text, where no white space is removed from its end. They include
    what the tokenizer puts before a text."""
    longer = []
    for probe in ("a", "0"):
        ids = vocabulary.encode(text + probe)
        longer.append(vocabulary.text_bytes(ids[_after_special_tokens(vocabulary, ids) :]))
    return longer[0][: shared_length(*longer)]


def shared_length(first: Sequence[int], second: Sequence[int]) -> int:
    """The length of the longest common prefix."""
    pairs = zip(first, second, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


class _Search:
    """One search for the covers of a prompt.

    Args:
        ids: the tokens of the prompt, without the part of a character that it can end in.
        text_start: the number of tokens before the text that can have other tokens in a cover.
        text: the bytes of this text, including `partial`.
        partial: the bytes of the part of a character at its end.
    """

    def __init__(self, vocabulary: Vocabulary, ids: list[int], text_start: int, text: bytes, partial: bytes) -> None:
        self.vocabulary, self.ids, self.text_start, self.text, self.partial = vocabulary, ids, text_start, text, partial
        lengths = (len(vocabulary.tokens[i]) for i in ids[text_start:])
        self.borders = [0, *accumulate(lengths)]  # byte offsets of the token borders in `text`
        self.certain, self.start = text_start, 0  # number of tokens that all covers share, and the offset after them

    def cover(self) -> Cover:
        if not self.text:
            return Cover(prompt=tuple(self.ids), common_prefix=tuple(self.ids), nodes=(Node((), b""),), text=b"")
        self._narrow()
        distinct: dict[Node, None] = {}
        for split in possible_splits(self.vocabulary, self.text[self.start :]):
            usable = (node for node in self._nodes(split) if self.vocabulary.has_rows(node.path))
            distinct.update(dict.fromkeys(usable))
        nodes = sorted(distinct, key=lambda node: not node.aligned)  # stable, so the prompt's own tokens are first
        if not nodes:
            raise DataError(f"{self.vocabulary.name} has no tokens for a character that begins with {self.partial!r}")
        common_prefix = nodes[0].path
        for node in nodes[1:]:
            common_prefix = common_prefix[: shared_length(common_prefix, node.path)]
        certain = tuple(self.ids[: self.certain])
        return Cover(
            prompt=certain + nodes[0].path if nodes[0].aligned else tuple(self.ids),
            common_prefix=certain + common_prefix,
            nodes=tuple(Node(node.path[len(common_prefix) :], node.suffix) for node in nodes),
            text=self.text,
        )

    def _narrow(self) -> None:
        """Move `start` to a border of pieces near the end that does not depend on the text after the prompt."""
        width, whole = _FIRST_WINDOW, len(self.text) - len(self.partial)
        while width < whole:
            first = bisect_right(self.borders, whole - width) - 1
            while first and self.text[self.borders[first]] & 0xC0 == 0x80:
                first -= 1  # a token that starts inside a character
            if self._narrow_from(first):
                return
            if width >= _LARGEST_WINDOW:
                self.certain, self.start = self.text_start + first, self.borders[first]
                return
            width *= 4
        self._narrow_from(0)

    def _narrow_from(self, first: int) -> bool:
        """Search the border after the first `first` tokens. False if there is none, or if the text after it has other
        tokens alone than in the prompt."""
        window = self.text[self.borders[first] : len(self.text) - len(self.partial)].decode()
        starts = self.vocabulary.piece_starts(window)[:-_PIECES_BACK]
        fixed = [at for at in starts if _is_fixed_border(window[at - 1], window[at])]
        if not fixed:
            return False
        start = self.borders[first] + len(window[: fixed[-1]].encode())
        n = bisect_left(self.borders, start)
        alone = self.vocabulary.encode_continuation(window[fixed[-1] :])
        if self.borders[n] != start or alone != self.ids[self.text_start + n :]:
            return False
        self.certain, self.start = self.text_start + n, start
        return True

    def _nodes(self, split: Split) -> Iterator[Node]:
        """The nodes for one split of the text into pieces, the last of which can continue after the prompt."""
        borders = [self.start, *(self.start + at for at in split.piece_starts)]
        before = tuple(i for a, b in pairwise(borders) for i in self.vocabulary.encode_piece(self.text[a:b]))
        piece = _OpenPiece(self, borders[-1])
        for path in piece.full_paths():
            yield Node(before + path, b"")
        for begin in piece.last_token_starts():
            path = piece.path(begin)
            if self._continues(path, self.text[begin:], split.next_bytes):
                yield Node(before + path, self.text[begin:])

    def _continues(self, path: tuple[int, ...], suffix: bytes, next_bytes: frozenset[int]) -> bool:
        """True if a token that is longer than `suffix` can follow the path in the tokens of a piece."""
        last = path[-1] if path else None
        if last is not None and not self.vocabulary.byte_level and not _is_text(self.vocabulary.tokens[last]):
            return True  # a byte of a character without a token is never merged
        return self.vocabulary.can_extend(last, suffix, next_bytes)


class _OpenPiece:
    """The piece that starts at byte `start` and can continue after the prompt."""

    def __init__(self, search: _Search, start: int) -> None:
        self.vocabulary, self.start = search.vocabulary, start
        self.text, self.partial = search.text, search.partial
        self.tokens: list[int] | None = None  # only of a long piece
        if len(self.text) - start > _LONG_PIECE and not self.vocabulary.unigram:
            n = bisect_left(search.borders, start)
            is_border = search.borders[n] == start
            from_prompt = search.ids[search.text_start + n :]
            self.tokens = from_prompt if is_border else self.vocabulary.encode_piece_start(self.text[start:])
            lengths = (len(self.vocabulary.tokens[i]) for i in self.tokens)
            self.borders = list(accumulate(lengths, initial=start))

    def full_paths(self) -> Iterator[tuple[int, ...]]:
        """The tokens of the piece up to the prompt's end, if the piece ends there, and if it continues."""
        stop = len(self.text)
        if self.partial and not self.vocabulary.byte_level:
            single = self.vocabulary.byte_tokens(self.partial)
            if single is not None:
                yield (*self.path(stop - len(self.partial)), *single)
            return
        if self.tokens is None:
            yield tuple(self.vocabulary.encode_piece(self.text[self.start :]))
        yield self.path(stop)

    def last_token_starts(self) -> Iterator[int]:
        """The offsets in the piece where a token can start that is longer than the rest of the prompt."""
        stop = len(self.text)
        for begin in range(max(self.start, stop - self.vocabulary.trie.longest + 1), stop):
            if self.vocabulary.trie.extends(self.text[begin:]):
                yield begin

    def path(self, stop: int) -> tuple[int, ...]:
        """The tokens of the piece up to `stop`, if a token ends there.

        In a long piece, only the tokens near `stop` are computed again: BPE gives a token sequence for its bytes if it
        gives each pair of neighbours for theirs.
        """
        if self.tokens is None:
            return tuple(self.vocabulary.encode_piece_start(self.text[self.start : stop]))
        n = bisect_right(self.borders, max(self.start, stop - 2 * self.vocabulary.trie.longest)) - 1
        while n > 0:
            is_border = self._is_character_border(n)
            rest = self.vocabulary.encode_piece_start(self.text[self.borders[n] : stop]) if is_border else []
            if rest and self._can_be_neighbours(self.tokens[n - 1], rest[0]):
                return (*self.tokens[:n], *rest)
            n -= 1
        return tuple(self.vocabulary.encode_piece_start(self.text[self.start : stop]))

    def _is_character_border(self, n: int) -> bool:
        return self.vocabulary.byte_level or self.text[self.borders[n]] & 0xC0 != 0x80

    def _can_be_neighbours(self, first: int, second: int) -> bool:
        data = self.vocabulary.tokens[first] + self.vocabulary.tokens[second]
        return (self.vocabulary.byte_level or _is_text(data)) and self.vocabulary.encode_piece_start(data) == [
            first,
            second,
        ]


def _is_fixed_border(before: str, after: str) -> bool:
    """True if a border of pieces between two characters does not depend on the text farther to the right. It does in
    white space, whose last character can join a word, and in digits, which can be grouped from the right."""
    return not before.isspace() and not (before.isnumeric() and after.isnumeric())


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
