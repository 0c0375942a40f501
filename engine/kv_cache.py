"""The cache of one sequence for the compiled kernels: copied on write, in memory or in a file, int8 or not.

`check_room` refuses a text whose keys and values do not fit, before any of it is read.
"""

from __future__ import annotations

import mmap
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..errors import ContextOverflow, Setting
from ..scaling.lengths import format_length
from .cache import ContiguousLayer

_CPU = torch.device("cpu")
_MAPPED_BYTES = 1 << 20
"""Buffers from this size on are mapped, so that the system has their memory again when they are freed. The C library
keeps holes of freed buffers, into which those of a longer text do not fit."""

Addresses = tuple[tuple[int, int, int], ...]
"""Of the keys and of the values of a layer: the address of the numbers, that of their scales (0 where there are none),
and the capacity in tokens."""

_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}


@dataclass(frozen=True, kw_only=True)
class CacheShape:
    """The sizes of a model's cache, and where its buffers are.

    Args:
        layers, heads, dim: numbers of layers and key-value heads, and the head dim.
        dtype: of keys and values. int8 rows have a float32 scale each.
        device: where they are.
        folder: for memory-mapped files with keys and values; None holds them in memory.
    """

    layers: int
    heads: int
    dim: int
    dtype: torch.dtype
    device: torch.device = _CPU
    folder: Path | None = None

    @property
    def bytes_per_token(self) -> int:
        """Bytes that the keys and values of a token take."""
        row = self.dim * self.dtype.itemsize + (4 if self.dtype == torch.int8 else 0)
        return 2 * self.layers * self.heads * row

    def buffer(self, capacity: int, scales: bool = False) -> Tensor:
        """An empty buffer for the keys or the values of a layer, [1, heads, capacity, dim].

        Args:
            scales: a buffer for their scales instead, [1, heads, capacity].
        """
        size = (1, self.heads, capacity, *(() if scales else (self.dim,)))
        dtype = torch.float32 if scales else self.dtype
        count = torch.Size(size).numel()
        if self.folder is None:
            if self.device.type != "cpu" or count * dtype.itemsize < _MAPPED_BYTES:
                return torch.empty(size, dtype=dtype, device=self.device)
            return torch.frombuffer(mmap.mmap(-1, count * dtype.itemsize, **_PRIVATE), dtype=dtype).view(size)
        with tempfile.NamedTemporaryFile(dir=self.folder, prefix="ropewalk-", suffix=".kv") as file:
            return torch.from_file(file.name, shared=True, size=count, dtype=dtype).view(size)


class KVLayer(ContiguousLayer):
    """Keys and values of one layer, [1, heads, capacity, dim]. Forks share the buffers until one writes.

    Keys are rotated as the runner's scaler stores them (`RotationTable.stored`).
    """

    addresses: Addresses

    def __init__(self, shape: CacheShape, capacity: int) -> None:
        super().__init__(capacity)
        self.shape = shape
        self._join(set())
        self.dtype, self.device = shape.dtype, shape.device
        self.is_initialized = True
        buffers = {name: self._new(name, capacity) for name in self.buffers}
        self.__dict__.update(buffers, addresses=self._addresses(buffers))

    @staticmethod
    def _addresses(buffers: dict[str, Any]) -> Addresses:
        """The `addresses` of a layer with these buffers."""
        return tuple(
            (buffers[name].data_ptr(), buffers[scales].data_ptr() if scales in buffers else 0, buffers[name].shape[2])
            for name, scales in (("keys", "key_scales"), ("values", "value_scales"))
        )

    def __setstate__(self, state: dict[str, Any]) -> None:  # a deep copy has buffers of its own
        self.__dict__.update(state, addresses=self._addresses(state))

    def _copied(self, capacity: int, first: int = 0, skip: int = 0) -> dict[str, Any]:
        buffers = super()._copied(capacity, first, skip)
        return {**buffers, "addresses": self._addresses(buffers)}  # one update of the layer replaces both

    def _new(self, name: str, capacity: int) -> Tensor:
        return self.shape.buffer(capacity, name.endswith("scales"))

    def reserve(self, length: int) -> None:
        """Make room for `length` keys in buffers that no fork shares."""
        if length <= self.capacity and self.owned:
            return
        capacity = self.capacity if length <= self.capacity else max(length, 2 * self.capacity)
        self.__dict__.update(self._copied(capacity), capacity=capacity)
        self._separate()

    def evict(self, first: int, count: int, needed: int, moved: Tensor | None = None) -> None:
        super().evict(first, count, needed, moved)
        self._separate()

    def _join(self, sharers: set[object]) -> None:
        """Enter the layers that share the same buffers, until `_leave` is called or this layer is freed."""
        member = object()
        sharers.add(member)
        self._sharers = sharers
        self._leave = weakref.finalize(self, sharers.discard, member)

    def _separate(self) -> None:
        """Record that the buffers are new and shared with no layer.

        Leaving the old sharers comes last: after an interruption the layer still counts among them.
        """
        leave = self._leave
        self._join(set())
        leave()

    @property
    def owned(self) -> bool:
        """True if no fork shares the buffers."""
        return len(self._sharers) == 1

    def fork(self) -> KVLayer:
        """A layer that continues from here. The buffers are copied when one of the two writes."""
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._join(self._sharers)
        return other

    def update(self, key_states: Tensor, value_states: Tensor, first: int = 0, **__: Any) -> tuple[Tensor, Tensor]:
        """Append [1, heads, n, dim] and return the keys and values from `first` on."""
        keys, values = super().update(key_states, value_states)
        return keys[:, :, first:], values[:, :, first:]

    def key_rows(self, start: int, stop: int) -> Tensor:
        """Keys [start, stop), float32 [1, heads, n, dim]."""
        return self.keys[:, :, start:stop].float()

    def write_keys(self, start: int, keys: Tensor) -> None:
        """Replace the keys from `start` on. The layer must own its buffers (`reserve`)."""
        self._write_keys(self.__dict__, start, keys)


class Int8Layer(KVLayer):
    """Keys and values as int8, with one float32 scale for each row of a head."""

    buffers = ("keys", "values", "key_scales", "value_scales")
    key_scales: Tensor
    value_scales: Tensor

    def update(self, key_states: Tensor, value_states: Tensor, first: int = 0, **__: Any) -> tuple[Tensor, Tensor]:
        start, end = self.length, self.length + key_states.shape[2]
        self.reserve(end)
        self.write_keys(start, key_states)
        _write_codes(self.values, self.value_scales, start, value_states)
        self.length = end
        return (
            _numbers(self.keys, self.key_scales, first, end, key_states.dtype),
            _numbers(self.values, self.value_scales, first, end, value_states.dtype),
        )

    def key_rows(self, start: int, stop: int) -> Tensor:
        return _numbers(self.keys, self.key_scales, start, stop, torch.float32)

    @staticmethod
    def _write_keys(buffers: dict[str, Tensor], start: int, keys: Tensor) -> None:
        _write_codes(buffers["keys"], buffers["key_scales"], start, keys)


def _write_codes(codes: Tensor, scales: Tensor, start: int, states: Tensor) -> None:
    """Write rows from `start` on as int8."""
    rows = slice(start, start + states.shape[2])
    codes[:, :, rows], scales[:, :, rows] = int8_rows(states)


def _numbers(codes: Tensor, scales: Tensor, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Rows [start, stop) as numbers, rounded once to `dtype`. An int8 code is exact in each."""
    return codes[:, :, start:stop].to(dtype).mul_(scales[:, :, start:stop, None])


def int8_rows(states: Tensor) -> tuple[Tensor, Tensor]:
    """Round rows to int8. The scale of a row is its largest magnitude over 127.

    Returns:
        The codes, and the float32 scale of each row. Code times scale is the number.
    """
    scales = states.float().abs().amax(-1) / 127
    return (states / scales.clamp(min=1e-30)[..., None]).round_().to(torch.int8), scales


class KVCache(Cache):  # type: ignore[misc]
    """Keys and values of all layers. Layers with a window hold the whole past, too.

    Args:
        capacity: tokens that fit before the buffers grow.
    """

    def __init__(self, shape: CacheShape, capacity: int) -> None:
        kind = Int8Layer if shape.dtype == torch.int8 else KVLayer
        super().__init__(layers=[kind(shape, max(capacity, 1)) for _ in range(shape.layers)])
        self._addresses: tuple[list[Addresses], np.ndarray[Any, Any]] = [], np.empty(0)

    @property
    def length(self) -> int:
        """Keys held."""
        return int(self.layers[0].length)

    @property
    def addresses(self) -> np.ndarray[Any, Any]:
        """Those of all layers, int64 [layers, 2, 3]; the same array until a buffer is replaced."""
        now = [layer.addresses for layer in self.layers]
        if self._addresses[0] != now:
            self._addresses = now, np.array(now, np.int64)
        return self._addresses[1]

    def reserve(self, count: int) -> None:
        """Make room for `count` more tokens."""
        for layer in self.layers:
            layer.reserve(layer.length + count)

    @property
    def owned(self) -> int:
        """Tokens whose buffers no fork shares: all or none."""
        return self.length if self.layers[0].owned else 0

    def advance(self, count: int) -> None:
        """Count `count` tokens that the caller wrote into the buffers."""
        for layer in self.layers:
            layer.length += count

    def fork(self) -> KVCache:
        """An independent cache that continues from here."""
        other = KVCache.__new__(KVCache)
        Cache.__init__(other, layers=[layer.fork() for layer in self.layers])
        other._addresses = self._addresses
        return other


def addresses_of(caches: Sequence[KVCache]) -> np.ndarray[Any, Any]:
    """The addresses of the keys and values of several tokens, int64 [layers, N, 2, 3].

    On the last axis: the address of the numbers, that of their scales (or 0), and the capacity in tokens.

    Args:
        caches: that of every token.
    """
    return np.stack([cache.addresses for cache in caches], 1)


def owned_tokens(caches: Iterable[Cache | None]) -> int:
    """Tokens of caches that have memory already, which no fork shares."""
    return sum(cache.owned if isinstance(cache, KVCache) else _held(cache) for cache in caches if cache is not None)


def _held(cache: Cache) -> int:
    """Keys in a cache of transformers' modules that has our layers."""
    first = next(iter(cache.layers), None)
    return first.length if isinstance(first, ContiguousLayer) else 0


def check_room(shape: CacheShape, tokens: int, reserved: int = 0) -> None:
    """Refuse `tokens` more tokens whose keys and values do not fit into memory, or into the folder of the cache.

    Args:
        reserved: bytes that other caches will take.

    Raises:
        ContextOverflow: with the numbers, and the kv_dtype or offload that would fit.
    """
    if shape.folder is not None:
        available = shutil.disk_usage(shape.folder).free
    elif shape.device.type == "cuda":
        available = free_on_gpu(shape.device)
    else:
        available = psutil.virtual_memory().available
    available = max(0, available - reserved)
    needed = shape.bytes_per_token * tokens
    if needed <= available:
        return
    ways: list[list[str | Setting]] = []
    if shape.dtype != torch.int8:
        smaller = replace(shape, dtype=torch.int8)
        if smaller.bytes_per_token * tokens <= available:
            ways.append([Setting("kv_dtype", "int8", "load"), f" ({gigabytes(smaller.bytes_per_token * tokens)}), or "])
    if shape.folder is None and shape.device.type == "cpu":
        ways.append([Setting("offload", "FOLDER", "load"), ", which keeps keys and values in a file there, or "])
    ways.append([f"take at most {format_length(available // shape.bytes_per_token)} tokens"])
    where = "GPU memory" if shape.device.type == "cuda" else "memory"
    if shape.folder is not None:
        where = f"free space in {shape.folder}"
    raise ContextOverflow(
        f"keys and values of {format_length(tokens)} tokens take {gigabytes(needed)}, more than the "
        f"{gigabytes(available)} of {where}; ",
        *(part for way in ways for part in way),
    )


def free_on_gpu(device: torch.device) -> int:
    """Bytes that torch can still allocate on a GPU: free ones, and those that its allocator holds in reserve."""
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + held


def gigabytes(count: int) -> str:
    """A number of bytes for a message."""
    return f"{count / 1e9:.3g} GB"
