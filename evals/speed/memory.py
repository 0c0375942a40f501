"""Peak memory of this process."""

from __future__ import annotations

import re
import sys
from pathlib import Path


def peak_memory_mb() -> float:
    """Most memory held so far, MB (10^6 bytes): of the GPU where there is one, else resident
    memory."""
    import torch

    return torch.cuda.max_memory_allocated() / 1e6 if torch.cuda.is_available() else peak_resident_mb()


def peak_resident_mb() -> float:
    """Most resident memory held so far, MB (10^6 bytes); files that are mapped count as far as they
    were read."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage starts a child with its parent's peak
        match = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if match:
            return int(match[1]) * 1024 / 1e6
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
