"""Tokenizers: text to tokens and back, by their bytes. It does not import torch."""

from __future__ import annotations

if not __name__.startswith("ropewalk."):
    raise ImportError("import this package as 'ropewalk.tokenizer_tools'")
