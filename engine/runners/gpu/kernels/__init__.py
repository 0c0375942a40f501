"""Triton kernels for the operations of a decode step. Import `TritonOps` from `ops.py` where `UNAVAILABLE` is None.

Triton comes with torch's builds for CUDA. Nothing else in the engine imports it.
"""

from __future__ import annotations

from importlib.util import find_spec

UNAVAILABLE: str | None = None if find_spec("triton") else "triton is not installed; install torch's build for CUDA"
"""The reason why this Python has no Triton kernels; None if it has them."""
