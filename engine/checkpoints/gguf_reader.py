"""gguf's reader of GGUF files, made faster, and strict about the end of the file."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
from gguf import GGUFValueType

__all__ = ["Reader"]

_LENGTH = 8  # bytes of the length of a string or array
_ITEM_TYPE = 4


class Reader(gguf.GGUFReader):  # type: ignore[misc]
    """gguf's reader with a plain array as a view of the mapped file.

    A slice of a memmap takes three times as long as one of a plain array. Lists, such as a vocabulary, are read
    without several calls for each item (49k tokens with types and merges: 0.1 s instead of 4.5 s).
    """

    @property
    def data(self) -> Any:
        return self._data

    @data.setter
    def data(self, mapped: Any) -> None:
        self._data = mapped.view(np.ndarray)

    def _get(self, offset: int, dtype: Any, count: int = 1, **order: Any) -> Any:
        values = super()._get(offset, dtype, count, **order)
        if len(values) < count:  # gguf would continue with empty values, as often as a damaged count states
            raise ValueError("the file ends within a field or tensor")
        return values

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        if raw_type != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        item_type, count = self._get(orig_offs, np.uint32), self._get(orig_offs + _ITEM_TYPE, np.uint64)
        kind, start = GGUFValueType(item_type[0]), orig_offs + _ITEM_TYPE + _LENGTH
        if kind == GGUFValueType.STRING:
            items, end = self._strings(start, int(count[0]))
        elif kind in self.gguf_scalar_to_np:
            values = self._get(start, self.gguf_scalar_to_np[kind], count[0])
            items, end = list(values.reshape(-1, 1)), start + values.nbytes
        else:
            return super()._get_field_parts(orig_offs, raw_type)
        types = [GGUFValueType.ARRAY, *([kind] if items else [])]
        return end - orig_offs, [item_type, count, *items], list(range(2, 2 + len(items))), types

    def _strings(self, place: int, count: int) -> tuple[list[Any], int]:
        """The bytes of `count` strings from `place` on, and the place after them."""
        items, lengths, size = [], memoryview(self._data), len(self._data)
        order: Any = "little" if self.endianess == gguf.GGUFEndian.LITTLE else "big"
        for _ in range(count):
            start = place + _LENGTH
            place = start + int.from_bytes(lengths[start - _LENGTH : start], order)
            if place > size:
                raise ValueError("the file ends within a field or tensor")
            items.append(self._data[start:place])
        return items, place
