"""The models, scalers and texts that the plug-in for vLLM serves. Imported in the environments of ropewalk and vLLM."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

GREEDY = 24
"""Tokens that are written after every text."""

TRAINED, LENGTH = 256, 1024
"""Tokens that the small models were trained for, and that are served."""

TINY, SMOLLM2 = "tiny", "smollm2-135m"

_HEADS = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
_SMALL = {**_HEADS, "max_position_embeddings": TRAINED}
_WINDOWS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 48, "query_pre_attn_scalar": 24}
FAMILIES: dict[str, dict[str, Any]] = {
    "mistral": {**_SMALL, "sliding_window": None},
    "qwen2": _SMALL,
    "qwen3": _SMALL,
    "granite": {**_SMALL, "attention_multiplier": 0.2},
    "gemma2": {**_SMALL, **_WINDOWS, "attn_logit_softcapping": 2.0},
    "gemma3_text": {**_SMALL, **_WINDOWS},
}
"""Small random models (`tests/engine/families.py`): model type, and fields of the config."""

FAMILY_VOCABULARY = 97

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
FAMILY_SPECS = ("yarn:4", "self-extend:8,window=64", "rerope:64|logn")
LONG_SPECS = ("rerope:0.5x|logn", "self-extend:8,window=0.25x")

FIXED = ("jet-long:64",)
"""Scalers that depend on the length; they are held at `LENGTH`."""

SHORT = ("string:128,window=16", "logn", "temperature:1.2")
"""Scalers that are exported for fewer tokens, and served for `LENGTH` by an override."""

SHOWN = SPECS[0]
"""The scaler under which many requests run together, are preempted, and run in other ways."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model under a scaler.

    Args:
        groups: the checks, each group by an engine of its own.
        texts: the texts that they read.
        length: the tokens that are served.
    """

    model: str
    scaler: str
    groups: tuple[str, ...] = ("served",)
    texts: tuple[str, ...] = ("together", "shared")
    length: int = LENGTH

    @property
    def name(self) -> str:
        """As a file name."""
        return f"{self.model}-" + "".join(c if c.isalnum() else "-" for c in self.scaler)

    @property
    def named(self) -> str:
        """The scaler that the folder names. One of frequencies alone takes its place by an override."""
        return SHOWN if self.scaler == "yarn:4" else self.scaler


def cases() -> Iterator[Case]:
    """All of them."""
    for model in FAMILIES:
        for scaler in FAMILY_SPECS:
            yield Case(model=model, scaler=scaler)
    for scaler in SPECS:
        if scaler == SHOWN:
            groups = ("served", "many", "preempted", "two processes", "two stages", "compiled")
            yield Case(model=TINY, scaler=scaler, groups=groups, texts=("together", "shared", "many"))
        else:
            yield Case(model=TINY, scaler=scaler)
    for scaler in LONG_SPECS:
        yield Case(model=SMOLLM2, scaler=scaler, groups=("long",), texts=("long",), length=16384)


def texts(case: Case, ids: list[int]) -> dict[str, list[list[int]]]:
    """Token ids of the requests, by the check."""
    if case.model in FAMILIES:
        ids = [one % FAMILY_VOCABULARY for one in ids]
    found = {
        "together": [ids[:900], ids[100:600], ids[50:150]],
        "shared": [ids[:900], ids[:600] + ids[1000:1100]],
        "many": [ids[start : start + 10 + 29 * start] for start in range(32)],
        "long": [ids[: case.length - GREEDY]],
    }
    return {name: found[name] for name in case.texts}
