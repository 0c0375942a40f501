"""Everything that measures, with plots and reports. It needs the extra `ropewalk[evals]`."""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if not __name__.startswith("ropewalk."):
    raise ImportError("import this package as 'ropewalk.evals'")

from ..errors import ConfigError

_NEEDED = ("matplotlib", "scipy", "cmaes", "wonderwords", "httpx2")
"""Modules of the extra `evals` in pyproject.toml."""

if _missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
    raise ConfigError(
        f"measuring and plotting need ropewalk[evals] (not installed: {', '.join(_missing)}): "
        "pip install 'ropewalk[evals]'"
    )

if TYPE_CHECKING:
    from .api import HarmRow, LongPPLRow, PerplexityRow, RepeatRow, perplexity
    from .data import load_text
    from .retrieval.haystack import boundary, noise, with_needles
    from .retrieval.task import Draft, Place, Task, match_all, match_first
    from .tuning.candidates import Candidate, Tuned

_LAZY = {
    "load_text": ".data",
    "perplexity": ".api",
    **dict.fromkeys(("PerplexityRow", "LongPPLRow", "RepeatRow", "HarmRow"), ".api"),
    **dict.fromkeys(("Draft", "Place", "Task", "match_all", "match_first"), ".retrieval.task"),
    **dict.fromkeys(("boundary", "noise", "with_needles"), ".retrieval.haystack"),
    **dict.fromkeys(("Candidate", "Tuned"), ".tuning.candidates"),
}

__all__ = [
    "Candidate",
    "Draft",
    "HarmRow",
    "LongPPLRow",
    "PerplexityRow",
    "Place",
    "RepeatRow",
    "Task",
    "Tuned",
    "boundary",
    "load_text",
    "match_all",
    "match_first",
    "noise",
    "perplexity",
    "with_needles",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'ropewalk.evals' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
