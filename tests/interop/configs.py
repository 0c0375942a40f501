"""Rotary configs of every kind, for what an engine makes of them."""

from __future__ import annotations

from typing import Any

HEAD_DIM = 64
TRAINED = 2048
MAX_LENGTH = 8192
"""`max_position_embeddings` of the configs, and the longest text that the server takes."""

_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED}
_LONG = {
    "rope_type": "longrope",
    "factor": 4.0,
    "original_max_position_embeddings": TRAINED,
    "short_factor": [1.0] * (HEAD_DIM // 2),
    "long_factor": [1 + pair / 10 for pair in range(HEAD_DIM // 2)],
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": TRAINED,
}

CONFIGS: dict[str, dict[str, Any]] = {
    name: {"rope_theta": 10_000.0, **parameters}
    for name, parameters in {
        "default": {"rope_type": "default"},
        "linear": {"rope_type": "linear", "factor": 4.0},
        "linear, factor 4 without a point": {"rope_type": "linear", "factor": 4},
        "dynamic": {"rope_type": "dynamic", "factor": 4.0},
        "yarn": _YARN,
        "yarn with attention_factor": _YARN | {"attention_factor": 1.3},
        "yarn with mscale, mscale_all_dim": _YARN | {"mscale": 0.8, "mscale_all_dim": 0.5},
        "yarn with truncate false": _YARN | {"truncate": False},
        "yarn with beta_fast, beta_slow": _YARN | {"beta_fast": 16.0, "beta_slow": 2.0},
        "longrope": _LONG,
        "longrope with attention_factor": _LONG | {"attention_factor": 1.5},
        "longrope with attention_factor and the mscales": _LONG
        | {"attention_factor": 1.5, "short_mscale": 1.5, "long_mscale": 1.5},
        "llama3": _LLAMA3,
        "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.5},
        "proportional with factor": {"rope_type": "proportional", "partial_rotary_factor": 0.5, "factor": 4.0},
    }.items()
}
"""`rope_parameters` by name."""
