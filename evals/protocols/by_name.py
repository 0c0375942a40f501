"""The table of perplexity protocols by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from ...errors import ConfigError, Setting, did_you_mean
from .fixed_target import FixedTarget, Repeat, SameTarget, usual_target
from .harm import Harm
from .longppl import LongPPL
from .protocol import Protocol
from .whole_text import ByPosition, Disjoint, LlamaCpp, Sliding, Truncate

_CLASSES: tuple[type[Protocol], ...] = (
    *(FixedTarget, ByPosition, Sliding, Truncate),
    *(LlamaCpp, Disjoint, LongPPL, Repeat, Harm),
)

PROTOCOLS: dict[str, type[Protocol]] = {cls.name: cls for cls in _CLASSES}
"""All protocols."""


def settings_of(name: str) -> list[str]:
    """The settings of a protocol except its contexts.

    Raises:
        ConfigError: there is no such protocol.
    """
    if name not in PROTOCOLS:
        raise ConfigError(f"unknown protocol {name!r}.{did_you_mean(name, PROTOCOLS)}")
    return [f.name for f in dataclasses.fields(PROTOCOLS[name]) if f.name != "contexts"]


def users_of(setting: str) -> list[str]:
    """The protocols that have a setting."""
    return [name for name in PROTOCOLS if setting in settings_of(name)]


def protocol(name: str, contexts: Sequence[int], **settings: Any) -> Protocol:
    """Make the protocol with this name.

    Args:
        contexts: window lengths in tokens.
        settings: fields of the protocol. The others keep their defaults; the default of `target` is
            `usual_target`.

    Raises:
        ConfigError: unknown name, unknown setting, or a value that is not allowed.
    """
    known = settings_of(name)
    for setting in settings:
        if setting not in known:
            users = ", ".join(users_of(setting))
            hint = f"leave it out, or use {users}" if users else f"it takes {', '.join(known)}"
            raise ConfigError(Setting(setting, form="name"), f" has no effect on {name}; {hint}")
    chosen = PROTOCOLS[name]
    if issubclass(chosen, SameTarget):
        settings = {"target": usual_target(contexts)} | settings
    return chosen(contexts=tuple(contexts), **settings)
