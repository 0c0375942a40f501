"""The face that all engines of a comparison share, and what one is opened with."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from typing import Protocol

import numpy as np

Logits = np.ndarray[tuple[int], np.dtype[np.float32]]
"""Float32 [V] on the CPU, so that whoever holds them has waited for the device."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What an engine is opened with.

    Args:
        kind: a key of `ENGINES`.
        dtype: of the weights, in the engine's own words; "auto" for ropewalk alone.
        source: what it loads: for ropewalk what `load` takes, for hf a folder or hub id, for llama.cpp a file.
        context: tokens of the longest prompt.
        room: most tokens that follow a prompt.
        threads: of the CPU.
        device: "cpu" or "cuda".
    """

    kind: str
    dtype: str
    source: str
    context: int
    room: int
    threads: int
    device: str = "cpu"

    @property
    def name(self) -> str:
        """How tables call it."""
        return f"{self.kind} {self.dtype}"


class Engine(Protocol):
    """A model and the state of one text.

    Attributes:
        dtype: of the weights.
        cache_dtype: of the keys and values.
        versions: of what it is made of.
        remark: what the tables say after its name, such as that a slower path runs the model; empty for most.
    """

    dtype: str
    cache_dtype: str
    versions: dict[str, str]
    remark: str

    def prefill(self, ids: list[int]) -> Logits:
        """Forget everything, read `ids`, and return the logits after the last of them."""
        ...

    def step(self, token: int) -> Logits:
        """Read one token more, and return the logits after it."""
        ...

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        ...


def versions_of(*packages: str) -> dict[str, str]:
    """Versions of those `packages` that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
