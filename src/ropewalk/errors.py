"""Every error that ropewalk raises on purpose.

    RopewalkError
    ├── ConfigError         a scaler, an option or a config that is not valid
    ├── UnsupportedModel    a model whose position encoding ropewalk cannot verify
    ├── PatchError          a patch that cannot be applied or undone now
    ├── ContextOverflow     a request for more tokens than the model and its scaler reach
    │   └── OutOfMemory     the memory ran out during a run
    ├── AssetError          a model or text that cannot be downloaded, checked or stored
    ├── DataError           a text that cannot be read or is too short
    └── EndpointError       a server that cannot be reached, or whose answer cannot be used

A message names the value, the limit and the next step. The shell prints the message alone and exits
with code 2.
"""

from __future__ import annotations

import difflib
import re
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

__all__ = [
    "AssetError",
    "ConfigError",
    "ContextOverflow",
    "DataError",
    "EndpointError",
    "OutOfMemory",
    "PatchError",
    "RopewalkError",
    "RopewalkWarning",
    "Setting",
    "UnsupportedModel",
    "did_you_mean",
    "first_line",
    "warn",
]


@dataclass(frozen=True)
class Setting:
    """A setting in a message.

        raise ContextOverflow("the prompt is too long; shorten it, or ", Setting("max_length", 9000, "load"))

    Args:
        name: name of the argument. The shell's option has the same name with dashes.
        value: the value that it has or should have. Upper case stands for a value that the user chooses (FOLDER).
        form: how a message names it, in Python and in the shell:
            "argument": max_length=9000, --max-length 9000
            "load": load with max_length=9000, add --max-length 9000
            "model": set model.rope = 'auto', add --rope auto
            "given": top_p 2, --top-p 2
            "name": top_p, --top-p
        python: the words for Python, if they differ from the form's.
    """

    name: str
    value: object = None
    form: Literal["argument", "load", "model", "given", "name"] = "argument"
    python: str | None = None

    def __str__(self) -> str:
        if self.python is not None:
            return self.python
        if self.form == "name":
            return self.name
        if self.form == "given":
            return f"{self.name} {self.value}"
        is_placeholder = isinstance(self.value, str) and self.value.isupper()
        value = self.value if is_placeholder else repr(self.value)
        if self.form == "model":
            return f"set model.{self.name} = {value}"
        return f"{'load with ' if self.form == 'load' else ''}{self.name}={value}"


class _Parts(Exception):
    """An exception whose arguments are the parts of its message: strings and settings."""

    def __str__(self) -> str:
        return "".join(map(str, self.args))


class RopewalkError(_Parts):
    """Base class of all errors that ropewalk raises on purpose."""


class RopewalkWarning(_Parts, UserWarning):
    """A warning that names a setting."""


class ConfigError(RopewalkError, ValueError):
    """A scaler, an option or a config that is not valid."""


class UnsupportedModel(RopewalkError):
    """A model whose position encoding ropewalk cannot verify, and which it therefore does not change."""


class PatchError(RopewalkError):
    """A patch that cannot be applied or undone in the model's present state."""


class ContextOverflow(RopewalkError):
    """A request for more tokens than the model and its scaler reach."""


class OutOfMemory(ContextOverflow):
    """The memory ran out during a run, also with smaller batches and chunks.

    Attributes:
        finished: for a list of prompts, the `Completion`s that were complete before, by index.
    """

    def __init__(self, *message: str | Setting) -> None:
        super().__init__(*message)
        self.finished: dict[int, Any] = {}


class AssetError(RopewalkError):
    """A model or text that cannot be downloaded, checked or stored."""


class DataError(RopewalkError):
    """A text that cannot be read, or that is too short for the request."""


class EndpointError(RopewalkError):
    """A server that cannot be reached, or whose answer cannot be used."""


_COMPARED = 100  # characters of a word that are compared with names


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """`" Did you mean 'yarn'?"` if `word` is close to one of `known`, else a list of all names."""
    names = sorted(known)
    close = difflib.get_close_matches(str(word)[:_COMPARED].lower(), names, n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else f" Known: {', '.join(names)}."


def first_line(error: BaseException) -> str:
    """An error of another library in one line: its class and the start of its message."""
    text = re.sub(r"\s+", " ", str(error)).strip()
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


_BETWEEN = frozenset(("ropewalk", "torch", "transformers"))
"""Packages whose code lies between the line that a user wrote and a warning."""


def warn(message: Warning | str) -> None:
    """`warnings.warn` that names the line of the user's code which led to the warning."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _BETWEEN:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
