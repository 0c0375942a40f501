"""The vocabulary by its bytes: which tokens begin with given bytes."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping


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
