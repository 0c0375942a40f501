"""The protocols of perplexity by their names."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from ...errors import ConfigError, did_you_mean
from .fixed_target import FixedTarget, Repeat, SameTarget, usual_target
from .harm import Harm
from .longppl import LongPPL
from .protocol import Protocol
from .whole_text import ByPosition, Disjoint, LlamaCpp, Sliding, Truncate

_CLASSES: tuple[type[Protocol], ...] = (
    *(FixedTarget, ByPosition, Sliding, Truncate),
    *(LlamaCpp, Disjoint, LongPPL, Repeat, Harm),
)

PROTOCOLS: dict[str, type[Protocol]] = {one.name: one for one in _CLASSES}
"""All of them."""


def settings_of(name: str) -> list[str]:
    """The settings that a protocol takes besides its contexts.

    Raises:
        ConfigError: there is no such protocol.
    """
    if name not in PROTOCOLS:
        raise ConfigError(f"unknown protocol {name!r}.{did_you_mean(name, PROTOCOLS)}")
    return [f.name for f in dataclasses.fields(PROTOCOLS[name]) if f.name != "contexts"]


def users_of(setting: str) -> list[str]:
    """The protocols that take a setting."""
    return [name for name in PROTOCOLS if setting in settings_of(name)]


def protocol(name: str, contexts: Sequence[int], **settings: Any) -> Protocol:
    """The protocol of that name.

    Args:
        contexts: window lengths in tokens.
        settings: fields of the protocol; the others keep their defaults, and `target` is
            `usual_target`.

    Raises:
        ConfigError: unknown name, or a setting that it does not take or that cannot be right.
    """
    known = settings_of(name)
    for setting in settings:
        if setting not in known:
            users = ", ".join(users_of(setting))
            hint = f"leave it out, or use {users}" if users else f"it takes {', '.join(known)}"
            raise ConfigError(f"{setting} has no effect on {name}; {hint}")
    chosen = PROTOCOLS[name]
    if issubclass(chosen, SameTarget):
        settings = {"target": usual_target(contexts)} | settings
    return chosen(contexts=tuple(contexts), **settings)
