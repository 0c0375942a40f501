"""The scalers and texts that vLLM serves with the plug-in. Imported in the environments of ropewalk and of vLLM."""

from __future__ import annotations

LENGTH = 1024
"""Four times the trained length of the small model."""

GREEDY = 24
"""Tokens that are written after every text."""

SPECS = (
    "rerope:64|logn",
    "self-extend:8,window=64|logn",
    "dual-chunk",
    "leaky-rerope:64,k=8",
    "string:128,window=16",
    "jet-long:64",
    "yarn:4|rerope:128",
    "logn",
    "temperature:1.2",
)
FIXED = ("jet-long:64",)
"""Scalers that depend on the length; they are held at `LENGTH`."""

SHORT = ("string:128,window=16", "logn", "temperature:1.2")
"""Scalers that are exported for fewer tokens, and served for `LENGTH` by an override."""

MIXED = SPECS[0]
"""The scaler under which many requests run together, are preempted, and run on two processes."""

LISTED = ("together", "shared")
"""The texts that are read under every scaler."""


def texts(ids: list[int]) -> dict[str, list[list[int]]]:
    """Token ids of the requests, by the check."""
    return {
        "together": [ids[:900], ids[100:600], ids[50:150]],
        "shared": [ids[:900], ids[:600] + ids[1000:1100]],
        "mixed": [ids[start : start + 10 + 29 * start] for start in range(32)],
    }
