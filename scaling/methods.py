"""Every method by its name in a spec, and a table of them."""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
from typing import get_args

from ..errors import ConfigError
from ..plugins import Plugins
from .auto import Auto
from .base import Base, BaseBound, CriticalBase
from .interpolation import NTK, CoPE, DynamicNTK, Linear, NTKFixed, NTKMixed, Resonance
from .lengths import format_length
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodSummary:
    """One method in short.

    Attributes:
        name: of the method in a spec.
        fields: its fields in order; those with a default as `name=default`.
        facet: what it sets; None for `none`, which changes nothing.
        summary: what it does, one paragraph.
        source: paper or release.
    """

    name: str
    fields: tuple[str, ...]
    facet: str | None
    summary: str
    source: str

    @classmethod
    def of(cls, name: str, method: type[Scaler]) -> MethodSummary:
        """The summary of a class: fields from the dataclass, the paragraph from its docstring."""
        summary = inspect.cleandoc(method.__doc__ or "").split("\n\n")[0].replace("\n", " ")
        return cls(
            name=name,
            fields=tuple(map(_field, dataclasses.fields(method))),
            facet=method.facet,
            summary=summary if method.facet else "The untouched model.",
            source=method.source,
        )

    def __str__(self) -> str:
        """The spec without optional fields, the facet, and the first sentence."""
        required = ",".join(field for field in self.fields if "=" not in field)
        spec = f"{self.name}:{required}" if required else self.name
        sentence = textwrap.shorten(re.split(r"(?<=[.])\s", self.summary)[0], 100, placeholder=" ...")
        return f"{spec:<26} {self.facet or '':<16} {sentence}"


class MethodTable(tuple[MethodSummary, ...]):
    """Summaries of methods; prints one line for each."""

    def __repr__(self) -> str:
        return "\n".join(map(str, self))


def scalers() -> MethodTable:
    """Every method that a spec can name, those of other packages included.

        print(rw.scalers())
        [method.name for method in rw.scalers() if method.facet == "positions"]

    `ropewalk scalers` prints all fields and sources.
    """
    return MethodTable(MethodSummary.of(name, method) for name, method in METHODS.items())


def _field(field: dataclasses.Field[object]) -> str:
    if field.default is dataclasses.MISSING:
        return field.name
    if isinstance(field.default, bool):
        return f"{field.name}={str(field.default).lower()}"
    if isinstance(field.default, int) and field.metadata.get("length", False):
        return f"{field.name}={format_length(field.default)}"
    return f"{field.name}={field.default}"
