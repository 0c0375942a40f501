"""What a scaler of another package must be."""

from __future__ import annotations

import dataclasses
import re
from typing import get_args

from ..errors import ConfigError
from .auto import Auto
from .rope import Facet, Scaler


def as_method(name: str, value: object) -> type[Scaler]:
    """The class that an entry point of the group `ropewalk.scalers` leads to.

    Raises:
        ConfigError: it is no such class, or specs could not name it.
    """
    if not (isinstance(value, type) and issubclass(value, Scaler)):
        raise ConfigError(f"{value!r} is not a subclass of ropewalk.scaling.Scaler")
    if not re.fullmatch(r"[a-z][a-z0-9-]*", name) or name == Auto.name:
        raise ConfigError("its name must be lower-case letters, digits and hyphens, and not 'auto'")
    if value.name != name:
        raise ConfigError(f"{value.__name__}.name is {value.name!r}; it must be the entry point's")
    if value.facet not in get_args(Facet):
        raise ConfigError(f"{value.__name__}.facet is {value.facet!r}; it must be one of {', '.join(get_args(Facet))}")
    if not dataclasses.is_dataclass(value) or "__dataclass_fields__" not in vars(value):
        raise ConfigError(f"{value.__name__} needs the decorator @dataclass(frozen=True, kw_only=True)")
    return value
