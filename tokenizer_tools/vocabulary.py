"""What a tokenizer's tokens are in bytes, and where it may cut a text: the common face of every kind of tokenizer."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise

from ..errors import ConfigError, DataError
from .characters import broken, split_character


class ByteTrie:
    """A trie of byte strings, kept as a sorted list: the strings below a node are a range of it."""

    def __init__(self, tokens: Mapping[int, bytes]) -> None:
        self._ids = sorted(tokens, key=lambda i: tokens[i])
        self._keys = [tokens[i] for i in self._ids]
        self.longest = max(map(len, self._keys), default=0)

    def extensions(self, prefix: bytes) -> list[int]:
        """Ids of the tokens that begin with `prefix` and are longer, in the order of their bytes."""
        return self._ids[slice(*self._range(prefix))]

    def extends(self, prefix: bytes) -> bool:
        """True if some token begins with `prefix` and is longer."""
        start, stop = self._range(prefix)
        return start < stop

    def by_next_byte(self, prefix: bytes) -> Iterator[tuple[int, list[int]]]:
        """The extensions of `prefix`, in groups of the byte that follows it."""
        start, stop = self._range(prefix)
        while start < stop:
            byte = self._keys[start][len(prefix)]
            end = self._range(prefix + bytes([byte]))[1]
            yield byte, self._ids[start:end]
            start = end

    def exact(self, data: bytes) -> list[int]:
        """Ids of the tokens that are `data`."""
        return self._ids[bisect_left(self._keys, data) : bisect_right(self._keys, data)]

    def prefixes(self, data: bytes) -> list[int]:
        """Ids of the tokens that `data` begins with, `data` itself among them, shortest first."""
        return [i for n in range(1, min(len(data), self.longest) + 1) for i in self.exact(data[:n])]

    def _range(self, prefix: bytes) -> tuple[int, int]:
        start = bisect_right(self._keys, prefix)
        trimmed = prefix.rstrip(b"\xff")  # the first string after all that begin with `prefix`
        if not trimmed:
            return start, len(self._keys)
        return start, bisect_left(self._keys, trimmed[:-1] + bytes([trimmed[-1] + 1]), start)


_MOST_REMEMBERED = 100_000  # answers of `can_extend`, which takes thousands of tokenizations for a short suffix


class Vocabulary(ABC):
    """A tokenizer, seen as bytes. `vocabularies.vocabulary` makes one.

    A text is split into *pieces* (pre-tokens), then every piece into tokens. The tokens of a piece depend on its
    bytes alone.

    Attributes:
        tokens: the exact bytes of every token, by id; those of special and unused tokens are empty.
        special_ids: ids that are not text or that the tokenizer matches before anything else: special, added, unknown
            and unused tokens. No other token's bytes ever extend over one.
        byte_level: True if a token may begin or end inside a character.
        unigram: True if tokens are the best segmentation of a piece; unlike those of BPE, they need not be right where
            every two neighbours are.
        rows: tokens that the model has, if a model is known. A tokenizer may have more; a text that needs one of those
            is refused, and no cover has one.
        special_tokens: True if the name of a special token in a text stands for that token; else it is text like any
            other, so that no text can act as one.
        name: what to call the tokenizer in messages.
        kind: what sort of tokenizer it is, such as "byte-level BPE".
    """

    tokens: list[bytes]
    special_ids: frozenset[int]
    byte_level: bool
    unigram: bool = False
    rows: int | None = None
    special_tokens: bool
    name: str
    kind: str

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt: what the tokenizer puts before a text, and the text. Nothing is put behind it, and a
        text that begins with the start token gets no second one.

        Raises:
            DataError: the model has not all of them.
        """

    @abstractmethod
    def piece_starts(self, text: str) -> list[int]:
        """Where the pieces of `text` begin, as indices of its characters, without 0; empty for a single piece."""

    @abstractmethod
    def encode_piece(self, data: bytes) -> list[int]:
        """Tokens of a whole piece. Where `byte_level`, `data` may be any bytes, else it is UTF-8."""

    def encode_continuation(self, text: str) -> list[int]:
        """Tokens of a text that stands behind others, piece by piece: nothing is put before it, and names of special
        tokens are characters."""
        cuts = [0, *self.piece_starts(text), len(text)]
        return [i for a, b in pairwise(cuts) for i in self.encode_piece(text[a:b].encode())]

    def _asked(self, text: str) -> list[int]:
        """`behind`, with the special tokens that names in the text stand for if that is asked for."""
        names = sorted(self.special_names_in(text), key=len, reverse=True) if self.special_tokens else []
        parts = re.split(f"({'|'.join(map(re.escape, names))})", text) if names else [text]
        return [
            i for part in parts for i in (self.encode(part)[-1:] if part in names else self.encode_continuation(part))
        ]

    def encode_bytes(self, data: bytes) -> list[int]:
        """Token ids of any bytes: of text, as `encode` gives them; of what is no character, tokens of its bytes.

        Raises:
            DataError: there are no such tokens.
        """
        ids: list[int] = []
        at = 0
        for start, stop in broken(data):
            text = data[at:start].decode()
            ids = self._joined(ids + self._asked(text) if at else self.encode(text), text, data[start:stop])
            at = stop
        whole, rest = split_character(data[at:])
        text = whole.decode()
        ids = ids + self._asked(text) if at else self.encode(text)
        return self._joined(ids, text, rest) if rest else ids

    def _joined(self, ids: list[int], text: str, part: bytes) -> list[int]:
        """The tokens of `text`, which `ids` ends in, with `part`, which is no character, behind it."""
        if not self.byte_level:
            if (single := self.byte_tokens(part)) is None:
                raise DataError(f"{self.name} has no tokens for the bytes {part!r}, which are no character")
            return ids + single
        start = ([0, *self.piece_starts(text)])[-1]
        last, kept, dropped = text[start:].encode(), list(ids), b""
        while kept and len(dropped) < len(last):
            dropped = self.tokens[kept.pop()] + dropped
        if dropped != last:  # the tokenizer has changed the text
            last, kept = b"", ids
        return kept + self.encode_piece(last + part)

    def encode_piece_start(self, data: bytes) -> list[int]:
        """Tokens of `data` as the beginning of a longer piece, where a token ends at its end."""
        return self.encode_piece(data)

    def can_extend(self, last: int | None, suffix: bytes, next_bytes: frozenset[int]) -> bool:
        """True if a token that begins with `suffix` and goes on with one of `next_bytes` can stand behind the token
        `last`, or at the beginning, of a piece."""
        known = self._extended.get(key := (last, suffix, next_bytes))
        if known is None:
            if len(self._extended) >= _MOST_REMEMBERED:
                self._extended.clear()
            known = self._extended[key] = any(
                last is None or self.encode_piece_start(self.tokens[last] + self.tokens[token]) == [last, token]
                for byte, tokens in self.trie.by_next_byte(suffix)
                if byte in next_bytes
                for token in tokens
            )
        return known

    @cached_property
    def _extended(self) -> dict[tuple[int | None, bytes, frozenset[int]], bool]:
        return {}

    def byte_tokens(self, data: bytes) -> list[int] | None:
        """Tokens of one byte each, which stand for a character that has no token; None if there are none."""
        return None

    def special_names_in(self, text: str) -> list[str]:
        """Names of special tokens in `text` that `special_tokens` decides about."""
        return []

    @cached_property
    def adds_space(self) -> bool:
        """True if the tokenizer begins every text with a space of its own."""
        return self.text_bytes(self.encode("a")).startswith(b" ")

    @cached_property
    def trie(self) -> ByteTrie:
        """Every token that is text and that the model has, by its bytes."""
        tokens = enumerate(self.tokens[: self.rows])
        return ByteTrie({i: data for i, data in tokens if data and i not in self.special_ids})

    def text_bytes(self, ids: list[int]) -> bytes:
        """The bytes of a token sequence; special tokens have none, nor have those that only the model has."""
        return b"".join(self.tokens[i] for i in ids if i < len(self.tokens))

    def is_special(self, token: int) -> bool:
        """True for `special_ids` and for tokens that only the model has."""
        return token in self.special_ids or token >= len(self.tokens)

    def has_rows(self, ids: Sequence[int]) -> bool:
        """True if the model has all these tokens."""
        return self.rows is None or all(i < self.rows for i in ids)

    def checked(self, ids: list[int]) -> list[int]:
        """`ids`, if the model has all of them.

        Raises:
            DataError: it has not.
        """
        if self.rows is not None:
            check_ids(ids, self.rows)
        return ids


def check_text(text: object) -> None:
    """Refuse what is no text, and a lone surrogate, which no tokenizer and no file can hold.

    Raises:
        ConfigError: it is no string.
        DataError: with the place of the surrogate.
    """
    if not isinstance(text, str):
        raise ConfigError(f"a text is wanted here, not {type(text).__name__}; decode bytes first")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"the text holds half a surrogate pair, {text[error.start]!r}, as character {error.start}; it is no "
            "Unicode text (text.encode(errors='replace').decode() puts a question mark there)"
        ) from None


def check_ids(ids: Sequence[int], rows: int) -> None:
    """Refuse ids that a model with `rows` tokens has not.

    Raises:
        DataError: with the id.
    """
    if ids and not 0 <= (least := min(ids)) <= (most := max(ids)) < rows:
        raise DataError(
            f"token id {least if least < 0 else most} is not among this model's 0 to {rows - 1}; take the model's own "
            "tokenizer, or give a model whose tokenizer has more tokens as many rows (hf.resize_token_embeddings)"
        )
