"""Compiled kernels for the CPU. Import `step` from here: it compiles on first use, and the result is cached.

numba checks the time stamp of a single file to find out whether its cache is stale. But the kernels of this folder are
inlined into one another. So the name of the cache folder is a hash of all their files.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from ....storage import cache_dir

UNAVAILABLE: str | None = None
"""The reason why this machine has no compiled kernels; None if it has them."""

FOLDER: Path | None = None
"""The cache folder of the compiled kernels; it has no kernel (`*.nbi`) before the first use."""

try:
    import numba
except ImportError as error:  # numba is not installed, or does not support this NumPy
    UNAVAILABLE = f"numba cannot be imported: {error}"
else:
    _sources = sorted(Path(__file__).parent.glob("*.py"))
    _version = hashlib.sha256(b"".join(source.read_bytes() for source in _sources)).hexdigest()[:12]
    _before = numba.config.CACHE_DIR
    FOLDER = cache_dir() / "kernels" / _version
    try:
        numba.config.CACHE_DIR = str(FOLDER)
        from .step import project, step, touch
    finally:
        numba.config.CACHE_DIR = _before

__all__ = ["FOLDER", "UNAVAILABLE", "project", "step", "touch"]
