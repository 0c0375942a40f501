"""Whether a context fits into memory, known before any work is done."""

from __future__ import annotations

import dataclasses
import shutil

import psutil
import torch

from ..errors import ContextOverflow
from ..scaling.lengths import format_length
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


def _bytes(shape: CacheShape, forms: int) -> int:
    """Bytes a token: keys in every form, and values."""
    return shape.bytes_per_token * (forms + 1) // 2


def _gb(count: int) -> str:
    return f"{count / 1e9:.3g} GB"
