"""`Vocabulary`, the common interface of all kinds of tokenizers: the bytes of their tokens, and how they split text."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise

from ..errors import ConfigError, DataError
from .characters import invalid_runs, split_character


class ByteTrie:
    """Tokens by their bytes, in a sorted list: the tokens with the same prefix are a range of it."""

    def __init__(self, tokens: Mapping[int, bytes]) -> None:
        self._ids = sorted(tokens, key=lambda i: tokens[i])
        self._keys = [tokens[i] for i in self._ids]
        self.longest = max(map(len, self._keys), default=0)

    def extensions(self, prefix: bytes) -> list[int]:
        """The ids of the tokens that start with `prefix` and are longer, in the order of their bytes."""
        return self._ids[slice(*self._range(prefix))]

    def extends(self, prefix: bytes) -> bool:
        """True if a token starts with `prefix` and is longer."""
        start, stop = self._range(prefix)
        return start < stop

    def by_next_byte(self, prefix: bytes) -> Iterator[tuple[int, list[int]]]:
        """The extensions of `prefix`, grouped by the byte after it."""
        start, stop = self._range(prefix)
        while start < stop:
            byte = self._keys[start][len(prefix)]
            end = self._range(prefix + bytes([byte]))[1]
            yield byte, self._ids[start:end]
            start = end

    def exact(self, data: bytes) -> list[int]:
        """The ids of the tokens with exactly these bytes."""
        return self._ids[bisect_left(self._keys, data) : bisect_right(self._keys, data)]

    def prefixes(self, data: bytes) -> list[int]:
        """The ids of the tokens that `data` starts with, including `data` itself, shortest first."""
        return [i for n in range(1, min(len(data), self.longest) + 1) for i in self.exact(data[:n])]

    def _range(self, prefix: bytes) -> tuple[int, int]:
        start = bisect_right(self._keys, prefix)
        trimmed = prefix.rstrip(b"\xff")  # the first string after all that start with `prefix`
        if not trimmed:
            return start, len(self._keys)
        return start, bisect_left(self._keys, trimmed[:-1] + bytes([trimmed[-1] + 1]), start)


_MOST_CACHED = 100_000  # results of `can_extend`, which needs thousands of tokenizations for a short suffix


class Vocabulary(ABC):
    """A tokenizer by the bytes of its tokens. `vocabularies.vocabulary` makes one.

    A text is split into *pieces* (pre-tokens), and each piece into tokens. The tokens of a piece depend only on its
    bytes.

    Attributes:
        tokens: the exact bytes of every token, by id. Special and unused tokens have no bytes.
        special_ids: ids that are not text or that the tokenizer matches first: special, added, unknown and unused
            tokens. No token of a text overlaps one of them.
        byte_level: True if a token can start or end inside a character.
        unigram: True if the tokens are the best segmentation of a piece. For BPE a sequence is correct if each pair of
            neighbours is; for Unigram it can still be wrong.
        rows: the number of tokens of the model, if a model is known. A tokenizer can have more. A text that needs one
            of these is refused, and covers do not use them.
        special_tokens: True if the name of a special token in a text means that token. If it is False the name is
            plain text, and no text can contain a special token.
        name: name of the tokenizer in messages.
        kind: kind of the tokenizer, such as "byte-level BPE".
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
        """The token ids of a prompt: the start token, if the tokenizer adds one, and the text. No end token is added,
        and a text that starts with the start token gets no second one.

        Raises:
            DataError: the model does not have all of these tokens.
        """

    @abstractmethod
    def piece_starts(self, text: str) -> list[int]:
        """The character indices in `text` where its pieces start, without 0; empty for a single piece."""

    @abstractmethod
    def encode_piece(self, data: bytes) -> list[int]:
        """The token ids of a whole piece. With `byte_level`, `data` can be any bytes, else it is UTF-8."""

    def encode_continuation(self, text: str) -> list[int]:
        """The token ids of a text after other text, piece by piece. No start token is added, and names of special
        tokens are plain text."""
        borders = [0, *self.piece_starts(text), len(text)]
        return [i for a, b in pairwise(borders) for i in self.encode_piece(text[a:b].encode())]

    def _encode_with_names(self, text: str) -> list[int]:
        """`encode_continuation`, but with `special_tokens` the names of special tokens mean these tokens."""
        names = sorted(self.special_names_in(text), key=len, reverse=True) if self.special_tokens else []
        parts = re.split(f"({'|'.join(map(re.escape, names))})", text) if names else [text]
        return [
            i for part in parts for i in (self.encode(part)[-1:] if part in names else self.encode_continuation(part))
        ]

    def encode_bytes(self, data: bytes) -> list[int]:
        """The token ids of any bytes: as from `encode` for text, and tokens of single bytes where they are not UTF-8.

        Raises:
            DataError: the tokenizer has no tokens for these bytes.
        """
        ids: list[int] = []
        at = 0
        for start, stop in invalid_runs(data):
            text = data[at:start].decode()
            ids = ids + self._encode_with_names(text) if at else self.encode(text)
            ids = self._append_bytes(ids, text, data[start:stop])
            at = stop
        whole, rest = split_character(data[at:])
        text = whole.decode()
        ids = ids + self._encode_with_names(text) if at else self.encode(text)
        return self._append_bytes(ids, text, rest) if rest else ids

    def _append_bytes(self, ids: list[int], text: str, part: bytes) -> list[int]:
        """`ids`, which end with the tokens of `text`, and after them `part`, which is not UTF-8."""
        if not self.byte_level:
            if (single := self.byte_tokens(part)) is None:
                raise DataError(f"{self.name} has no tokens for the bytes {part!r}, which are not UTF-8")
            return ids + single
        start = ([0, *self.piece_starts(text)])[-1]
        last_piece, before, removed = text[start:].encode(), list(ids), b""
        while before and len(removed) < len(last_piece):
            removed = self.tokens[before.pop()] + removed
        if removed != last_piece:  # the tokenizer has changed the text
            last_piece, before = b"", ids
        return before + self.encode_piece(last_piece + part)

    def encode_piece_start(self, data: bytes) -> list[int]:
        """The token ids of `data` as the start of a longer piece, if a token ends where `data` ends."""
        return self.encode_piece(data)

    def can_extend(self, last: int | None, suffix: bytes, next_bytes: frozenset[int]) -> bool:
        """True if a token that starts with `suffix` and continues with one of `next_bytes` can follow the token `last`
        in a piece, or start a piece if `last` is None."""
        result = self._extended.get(key := (last, suffix, next_bytes))
        if result is None:
            if len(self._extended) >= _MOST_CACHED:
                self._extended.clear()
            result = self._extended[key] = any(
                last is None or self.encode_piece_start(self.tokens[last] + self.tokens[token]) == [last, token]
                for byte, tokens in self.trie.by_next_byte(suffix)
                if byte in next_bytes
                for token in tokens
            )
        return result

    @cached_property
    def _extended(self) -> dict[tuple[int | None, bytes, frozenset[int]], bool]:
        return {}

    def byte_tokens(self, data: bytes) -> list[int] | None:
        """Tokens of one byte each for a character without a token; None if the tokenizer has no such tokens."""
        return None

    def special_names_in(self, text: str) -> list[str]:
        """The names of special tokens in `text`. `special_tokens` decides what they mean."""
        return []

    @cached_property
    def adds_space(self) -> bool:
        """True if the tokenizer adds a space before every text."""
        return self.text_bytes(self.encode("a")).startswith(b" ")

    @cached_property
    def trie(self) -> ByteTrie:
        """The tokens that are text and that the model has, by their bytes."""
        tokens = enumerate(self.tokens[: self.rows])
        return ByteTrie({i: data for i, data in tokens if data and i not in self.special_ids})

    def text_bytes(self, ids: list[int]) -> bytes:
        """The bytes of a token sequence. Special tokens, and tokens that only the model has, have none."""
        return b"".join(self.tokens[i] for i in ids if i < len(self.tokens))

    def is_special(self, token: int) -> bool:
        """True for `special_ids` and for tokens that only the model has."""
        return token in self.special_ids or token >= len(self.tokens)

    def has_rows(self, ids: Sequence[int]) -> bool:
        """True if the model has all these tokens."""
        return self.rows is None or all(i < self.rows for i in ids)

    def checked(self, ids: list[int]) -> list[int]:
        """`ids`, after a check that the model has all of them.

        Raises:
            DataError: it does not.
        """
        if self.rows is not None:
            check_ids(ids, self.rows)
        return ids


def check_text(text: object) -> None:
    """Check that `text` is a string without lone surrogates, which tokenizers and files cannot hold.

    Raises:
        ConfigError: it is not a string.
        DataError: it has a lone surrogate; the message has its place.
    """
    if not isinstance(text, str):
        raise ConfigError(f"a text must be a string, not {type(text).__name__}; decode bytes first")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"the text has half a surrogate pair, {text[error.start]!r}, at character {error.start}; this is not "
            "Unicode text (text.encode(errors='replace').decode() replaces it by a question mark)"
        ) from None


def check_ids(ids: Sequence[int], rows: int) -> None:
    """Check that a model with `rows` tokens has all ids.

    Raises:
        DataError: it does not; the message has the id.
    """
    if ids and not 0 <= (least := min(ids)) <= (most := max(ids)) < rows:
        raise DataError(
            f"token id {least if least < 0 else most} is not among this model's 0 to {rows - 1}; take the model's own "
            "tokenizer, or resize the model to the tokenizer (hf.resize_token_embeddings)"
        )
