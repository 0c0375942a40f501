"""Text and tokens, without torch."""

from __future__ import annotations

if not __name__.startswith("ropewalk."):
    raise ImportError("import this package as 'ropewalk.tokenizer_tools'")
