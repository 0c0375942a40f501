"""Attention functions: banded attention for position maps, and causal attention over a cache."""
