"""Whether a context fits into memory: known before any work is done, or found out under way."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator

import psutil
import torch
from transformers.cache_utils import Cache

from ..errors import ContextOverflow, OutOfMemory
from ..scaling.lengths import format_length
from .cache import can_rewind, layers_agree, tokens_read
from .kv_cache import CacheShape


def check_room(shape: CacheShape, tokens: int, forms: int) -> None:
    """Refuse `tokens` more tokens of cache that do not fit, and say what would.

    Args:
        forms: in how many forms the scaler has keys held, 1 without a position map.

    Raises:
        ContextOverflow: with the numbers, and the kv_dtype or offload that would make it fit.
    """
    available = psutil.virtual_memory().available
    if shape.folder is not None:
        available = shutil.disk_usage(shape.folder).free
    needed = _bytes(shape, forms) * tokens
    if needed <= available:
        return
    ways = []
    if forms == 1 and shape.dtype != torch.int8:
        smaller = dataclasses.replace(shape, dtype=torch.int8)
        if smaller.bytes_per_token * tokens <= available:
            ways.append(f"load with kv_dtype='int8' ({_gb(smaller.bytes_per_token * tokens)})")
    if shape.folder is None:
        ways.append("load with offload=FOLDER, which keeps keys and values in a file there")
    ways.append(f"take at most {format_length(available // _bytes(shape, forms))} tokens")
    where = "memory" if shape.folder is None else f"free space in {shape.folder}"
    raise ContextOverflow(
        f"keys and values of {format_length(tokens)} tokens take {_gb(needed)}, more than the {_gb(available)} of "
        f"{where}; {', or '.join(ways)}"
    )


class CacheLost(OutOfMemory):
    """Memory ran out in the middle of a cache that cannot go back: whoever holds it has to read anew."""


@contextlib.contextmanager
def restoring(*caches: Cache) -> Iterator[None]:
    """Where memory runs out inside, caches are what they were before.

    An OutOfMemory of a block inside is let through: what was read before that block stays.

    Raises:
        OutOfMemory: in the place of what numpy and torch raise.
        CacheLost: the same, but a cache could not go back.
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
            f"out of memory after {sum(before)} tokens; shorten the text, ask for less at a time, load with a smaller "
            "dtype or kv_dtype, or end what else takes memory"
        ) from error


def _is_lack_of_memory(error: Exception) -> bool:
    """Also torch's on the CPU, which has no class of its own."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)


def _bytes(shape: CacheShape, forms: int) -> int:
    """Bytes a token: keys in every form, and values."""
    return shape.bytes_per_token * (forms + 1) // 2


def _gb(count: int) -> str:
    return f"{count / 1e9:.3g} GB"
