"""tiktoken encodings, and tekken (mistral_common), which wraps one behind a block of special ids."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from ..errors import DataError, UnsupportedModel, first_line
from .encode import start_ids
from .vocab import Vocabulary


class TiktokenVocabulary(Vocabulary):
    """A `tiktoken.Encoding`.

    Args:
        outer: the tokenizer of tiktoken, mistral_common or transformers that it is in.
        offset: special ids of tekken in front of its own.
    """

    byte_level = True
    special_tokens = False

    def __init__(self, encoding: Any, outer: Any, offset: int) -> None:
        import regex  # type: ignore[import-untyped]  # comes with tiktoken

        self._encoding, self._outer, self._offset = encoding, outer, offset
        self.name = encoding.name
        self.kind = "byte-level BPE (tiktoken)"
        self._ranks: dict[bytes, int] = encoding._mergeable_ranks
        missing = [byte for byte in range(256) if bytes([byte]) not in self._ranks]
        if missing:  # tiktoken panics where it meets one
            others = f", nor for {len(missing) - 1} others" if missing[1:] else ""
            raise UnsupportedModel(f"{self.name} is damaged: it has no token for the byte {missing[0]:#04x}{others}")
        self._pattern = regex.compile(encoding._pat_str)
        self._inside: dict[int, list[int]] = {}
        self.tokens = [b""] * (self._offset + encoding.max_token_value + 1)
        used = set()
        for data, rank in self._ranks.items():
            self.tokens[rank + self._offset] = data
            used.add(rank + self._offset)
        self.special_ids = frozenset(range(len(self.tokens))) - used

    def encode(self, text: str) -> list[int]:
        try:
            ids = [rank + self._offset for rank in self._encoding.encode_ordinary(text)]
        except BaseException as error:  # the class of a panic has no other name that can be imported
            if type(error).__name__ != "PanicException":
                raise
            raise DataError(
                f"the tokenizer gave up on this text of {len(text):,} characters ({first_line(error)}); it may hold a "
                "very long run of spaces"
            ) from None
        return self.checked([*(start_ids(self._outer) if callable(self._outer) else []), *ids])

    def cuts(self, text: str) -> list[int]:
        return [found.start() for found in self._pattern.finditer(text) if found.start()]

    def piece(self, data: bytes) -> list[int]:
        return [rank + self._offset for rank in self._encoding._encode_single_piece(data)] if data else []

    def beginning(self, data: bytes) -> list[int]:
        tokens = self.piece(data)
        if len(tokens) != 1:
            return tokens
        if tokens[0] not in self._inside:  # a piece that is a token is taken whole, but the beginning of a longer one
            self._inside[tokens[0]] = [self._ranks[part] + self._offset for part in self._merged(data)]
        return self._inside[tokens[0]]

    def _merged(self, data: bytes) -> list[bytes]:
        parts = [data[i : i + 1] for i in range(len(data))]
        while len(parts) > 1:
            ranks = [self._ranks.get(a + b, len(self.tokens)) for a, b in pairwise(parts)]
            best = min(ranks)
            if best == len(self.tokens):
                break
            i = ranks.index(best)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        return parts
