"""Peak memory of this process."""

from __future__ import annotations

import sys

import torch


def peak_memory_mb() -> float:
    """Most memory held so far, MB (10^6 bytes): of the GPU where there is one, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
