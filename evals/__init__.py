"""Perplexity and its plots and reports: everything that measures."""

from __future__ import annotations

if not __name__.startswith("ropewalk."):
    raise ImportError("import this package as 'ropewalk.evals'")
