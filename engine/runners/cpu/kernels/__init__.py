"""Compiled kernels for the CPU. Import `step` from here: it compiles on first use and is kept for the next process.

numba looks at the time stamp of one file to know whether its cache is stale; the kernels of this folder are inlined
into one another, so the cache lies in a folder named by what is in all of them.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from ....storage import cache_dir

UNAVAILABLE: str | None = None
"""Why there are no compiled kernels on this machine; None if there are."""

FOLDER: Path | None = None
"""Where the compiled kernels are kept; without a kernel (`*.nbi`) before the first use."""

try:
    import numba
except ImportError as error:  # it is not installed, or does not know this NumPy
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
