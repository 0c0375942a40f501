"""Every method by the name that specs have for it."""

from __future__ import annotations

import dataclasses
import re
from typing import get_args

from ..errors import ConfigError
from ..plugins import Plugins
from .auto import Auto
from .base import Base, BaseBound, CriticalBase
from .interpolation import NTK, CoPE, DynamicNTK, Linear, NTKFixed, NTKMixed, Resonance
from .longrope import LongRoPE
from .positions import DualChunk, JetLong, LeakyReRoPE, ReRoPE, SelfExtend, SinkWindow, String
from .rope import Facet, Scaler
from .temperature import LogN, Temperature
from .yarn import AlphaRoPE, DynamicYaRN, Llama3, MrRoPE, NTKByParts, YaRN

_BUILT_IN: dict[str, type[Scaler]] = {
    method.name: method
    for method in (
        Scaler,
        Linear,
        NTK,
        NTKFixed,
        NTKMixed,
        DynamicNTK,
        NTKByParts,
        YaRN,
        DynamicYaRN,
        Llama3,
        LongRoPE,
        Base,
        CriticalBase,
        BaseBound,
        MrRoPE,
        AlphaRoPE,
        Resonance,
        CoPE,
        ReRoPE,
        LeakyReRoPE,
        SelfExtend,
        DualChunk,
        String,
        JetLong,
        SinkWindow,
        LogN,
        Temperature,
    )
}


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


METHODS = Plugins(_BUILT_IN, group="ropewalk.scalers", kind="scaler", check=as_method)
"""Every method under its spec name: ours, then those of other packages."""
