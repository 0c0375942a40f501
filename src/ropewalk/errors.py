"""Every error that ropewalk raises on purpose.

    RopewalkError
    ├── ConfigError         a scaler, an option or a config that cannot be right
    ├── UnsupportedModel    a model whose position encoding ropewalk cannot verify
    ├── PatchError          a patch that cannot be applied or undone now
    ├── ContextOverflow     more tokens asked for than the model and scaler reach
    │   └── OutOfMemory     memory ran out under way
    ├── AssetError          a model or text that cannot be fetched, checked or stored
    ├── DataError           a text that cannot be read or is too short
    └── EndpointError       a server that cannot be reached, or answers what cannot be used

Messages name the offending value, the limit it met, and the next step. The shell prints the message
alone and exits with code 2.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any

__all__ = [
    "AssetError",
    "ConfigError",
    "ContextOverflow",
    "DataError",
    "EndpointError",
    "OutOfMemory",
    "PatchError",
    "RopewalkError",
    "UnsupportedModel",
    "did_you_mean",
    "first_line",
]


class RopewalkError(Exception):
    """Root of the tree: catch this to catch everything ropewalk raises on purpose."""


class ConfigError(RopewalkError, ValueError):
    """A scaler, an option or a config that cannot be right."""


class UnsupportedModel(RopewalkError):
    """A model whose position encoding ropewalk cannot verify, and so will not touch."""


class PatchError(RopewalkError):
    """A patch that cannot be applied or undone in the model's present state."""


class ContextOverflow(RopewalkError):
    """More tokens asked for than the model and its scaler reach."""


class OutOfMemory(ContextOverflow):
    """Memory ran out under way, and less at a time did not help.

    Attributes:
        finished: of several prompts, the `Completion`s that were done, by index.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.finished: dict[int, Any] = {}


class AssetError(RopewalkError):
    """A model or text that cannot be fetched, checked or stored."""


class DataError(RopewalkError):
    """A text that cannot be read, or is too short for what is asked of it."""


class EndpointError(RopewalkError):
    """A server that cannot be reached, or answers what cannot be used."""


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """`" Did you mean 'yarn'?"` when `word` is close to one of `known`, else the list of all."""
    names = sorted(known)
    close = difflib.get_close_matches(str(word).lower(), names, n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else f" Known: {', '.join(names)}."


def first_line(error: BaseException) -> str:
    """An error of another library in one line: its class and the beginning of what it says."""
    text = re.sub(r"\s+", " ", str(error)).strip()
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
