"""What is held against other engines: two models, under scalers of every kind, each in the form for the engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ropewalk.scaling import LongRoPE, Scaler


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model with its texts.

    Args:
        name: a built-in one, or a folder of this project.
        dim: of a head.
        within, beyond: tokens of a text that the model was trained for, and of one that it was not.
        far: the scalers for which the text beyond is read; None for all.
    """

    name: str
    dim: int
    within: int
    beyond: int
    far: tuple[str, ...] | None = None


MODELS = {
    "tiny": Model(name="tests/data/tiny-llama", dim=32, within=200, beyond=900),
    "smollm2": Model(name="smollm2-135m", dim=64, within=600, beyond=8448, far=("tuned",)),
}

TUNED = "tuned"
"""Unequal factors with a temperature of their own, as a search finds them."""

SERVED = (
    "none",
    "linear:4",
    "yarn:4",
    "yarn:4,attention_factor=1.3",
    "ntk:4",
    "ntk-mixed:4",
    "llama3:4",
    "mrrope:4",
    TUNED,
)
"""On both models, in every engine."""

STATIC = (
    "ntk-fixed:4",
    "ntk-by-parts:4",
    "yarn:4,truncate=false",
    "yarn:4,beta_fast=16,beta_slow=2",
    "base:2e5",
    "critical-base:1k",
    "base-bound:1k",
    "mrrope:4,uniform=true",
    "alpharope:4",
    "cope",
    "resonance",
    "yarn:4|resonance",
    "ntk-mixed:4|resonance",
)
"""On the small model in transformers: with `SERVED`, every method whose frequencies stand still."""

QUANTIZED = "ntk-mixed:4"
"""For a GGUF file in q8_0: written with it, and written without and then rewritten."""

FROZEN = ("dynamic-ntk:4", "dynamic-yarn")
"""Follow the length, and are held still at four times the trained one."""


def model_path(model: Model) -> str:
    """What `ropewalk.load` takes."""
    folder = Path(__file__).resolve().parents[2] / model.name
    return str(folder) if folder.is_dir() else model.name


def scaler(name: str, dim: int) -> str | Scaler:
    """What `ropewalk.export` takes, for a head of `dim`."""
    if name != TUNED:
        return name
    last = dim // 2 - 1
    factors = tuple(1 + 4 * (pair / last) ** 1.5 for pair in range(dim // 2))
    return LongRoPE(factor=4, short=factors, long=factors, attention_factor=1.1)
