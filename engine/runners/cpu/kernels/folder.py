"""The folder in which the compiled kernels are cached.

numba checks the time stamp of a single file to find out whether its cache is stale. But the kernels of this package are
inlined into one another. So the name of the cache folder is a hash of all their files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numba

from ....storage import cache_dir

_sources = sorted(Path(__file__).parent.glob("*.py"))
_version = hashlib.sha256(b"".join(source.read_bytes() for source in _sources)).hexdigest()[:12]

FOLDER = cache_dir() / "kernels" / _version
"""It has no kernel (`*.nbi`) before the first use."""


@contextmanager
def cached_in_folder() -> Iterator[None]:
    """Within this context numba's decorators cache in `FOLDER`."""
    before = numba.config.CACHE_DIR
    try:
        numba.config.CACHE_DIR = str(FOLDER)
        yield
    finally:
        numba.config.CACHE_DIR = before
