"""Perplexity and its plots and reports: everything that measures."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if not __name__.startswith("ropewalk."):
    raise ImportError("import this package as 'ropewalk.evals'")

if TYPE_CHECKING:
    from .api import perplexity
    from .data import load_text
    from .perplexity_row import HarmRow, LongPPLRow, PerplexityRow, RepeatRow
    from .tuned import Candidate, Tuned

_LAZY = {
    "load_text": ".data",
    "perplexity": ".api",
    **dict.fromkeys(("PerplexityRow", "LongPPLRow", "RepeatRow", "HarmRow"), ".perplexity_row"),
    **dict.fromkeys(("Candidate", "Tuned"), ".tuned"),
}

__all__ = ["Candidate", "HarmRow", "LongPPLRow", "PerplexityRow", "RepeatRow", "Tuned", "load_text", "perplexity"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'ropewalk.evals' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
