"""Banded attention: the attention of position maps."""
