"""Compiled kernels for the CPU. Import `step` from here: it compiles on first use, and the result is cached."""

from __future__ import annotations

from pathlib import Path

UNAVAILABLE: str | None = None
"""The reason why this machine has no compiled kernels; None if it has them."""

BLOCK_FORMATS: frozenset[int] = frozenset()
"""The ggml types of blocks that the kernels read."""

FORMATS: frozenset[int] = frozenset()
"""The ggml types of matrices that the kernels multiply: those of blocks, float32, float16 and bfloat16."""

HAS_BFLOAT16_PRODUCTS = False
"""True if this CPU multiplies pairs of bfloat16 numbers in one instruction."""

FOLDER: Path | None = None
"""The cache folder of the compiled kernels."""

try:
    import numba  # noqa: F401
except ImportError as error:  # numba is not installed, or does not support this NumPy
    UNAVAILABLE = f"numba cannot be imported: {error}"
else:
    from .folder import FOLDER, cached_in_folder

    with cached_in_folder():
        from .attention import part
        from .block_formats import BLOCK_FORMATS, FORMATS
        from .blocks import product, unpack
        from .by_address import touch
        from .flash import flash
        from .paged import paged
        from .step import project, step
        from .tile_products import HAS_BFLOAT16_PRODUCTS

__all__ = [
    "BLOCK_FORMATS",
    "FOLDER",
    "FORMATS",
    "HAS_BFLOAT16_PRODUCTS",
    "UNAVAILABLE",
    "flash",
    "paged",
    "part",
    "product",
    "project",
    "step",
    "touch",
    "unpack",
]
