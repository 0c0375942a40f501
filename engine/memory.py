"""Whether a context fits into memory: checked before the work, and handled where it fails later."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator

import psutil
import torch
from transformers.cache_utils import Cache

from ..errors import ContextOverflow, OutOfMemory, Setting
from ..scaling.lengths import format_length
from .cache import can_rewind, layers_agree, tokens_read
from .kv_cache import CacheShape


def check_room(shape: CacheShape, tokens: int, forms: int) -> None:
    """Refuse `tokens` more tokens of cache that do not fit, and say what would.

    Args:
        forms: copies of the keys that the scaler needs, 1 without a position map.

    Raises:
        ContextOverflow: with the numbers, and the kv_dtype or offload that would make it fit.
    """
    available = psutil.virtual_memory().available
    if shape.folder is not None:
        available = shutil.disk_usage(shape.folder).free
    needed = _bytes(shape, forms) * tokens
    if needed <= available:
        return
    ways: list[list[str | Setting]] = []
    if forms == 1 and shape.dtype != torch.int8:
        smaller = dataclasses.replace(shape, dtype=torch.int8)
        if smaller.bytes_per_token * tokens <= available:
            ways.append([Setting("kv_dtype", "int8", "load"), f" ({_gb(smaller.bytes_per_token * tokens)}), or "])
    if shape.folder is None:
        ways.append([Setting("offload", "FOLDER", "load"), ", which keeps keys and values in a file there, or "])
    ways.append([f"take at most {format_length(available // _bytes(shape, forms))} tokens"])
    where = "memory" if shape.folder is None else f"free space in {shape.folder}"
    raise ContextOverflow(
        f"keys and values of {format_length(tokens)} tokens take {_gb(needed)}, more than the {_gb(available)} of "
        f"{where}; ",
        *(part for way in ways for part in way),
    )


class CacheLost(OutOfMemory):
    """Memory ran out during a step, and the cache cannot be rewound: its text has to be read again."""


@contextlib.contextmanager
def restoring(*caches: Cache) -> Iterator[None]:
    """Where memory runs out inside, rewind the caches to what they held before.

    An OutOfMemory of a nested block passes: what was read before that block stays.

    Raises:
        OutOfMemory: in place of the errors of numpy and torch.
        CacheLost: the same, but a cache could not be rewound.
    """
    before = [tokens_read(cache) for cache in caches]
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_lack_of_memory(error):
            raise
        kind = OutOfMemory
        for cache, held in zip(caches, before, strict=True):
            excess = [tokens_read(layer) - held for layer in cache.layers]  # some layers may have the tokens already
            if not (layers_agree(cache) and can_rewind(cache, max(excess, default=0))):
                kind = CacheLost
                break
            for layer, count in zip(cache.layers, excess, strict=True):
                layer.crop(-count)
        raise kind(
            f"out of memory after {sum(before)} tokens; shorten the text, ask for less at a time, load with a smaller ",
            Setting("dtype", form="name"),
            " or ",
            Setting("kv_dtype", form="name"),
            ", or end other programs that take memory",
        ) from error


def _is_lack_of_memory(error: Exception) -> bool:
    """Torch's error on the CPU is a plain RuntimeError."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)


def _bytes(shape: CacheShape, forms: int) -> int:
    """Bytes a token: keys in every form, and values."""
    return shape.bytes_per_token * (forms + 1) // 2


def _gb(count: int) -> str:
    return f"{count / 1e9:.3g} GB"
