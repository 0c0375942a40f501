"""Spec strings such as `yarn:4` or `ntk:4|resonance`, and the table of the methods that they name."""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
import types
import typing
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn, get_args

from torch import Tensor

from ..errors import ConfigError, did_you_mean
from ..plugins import Plugins
from .band import Band
from .base import Base, BaseBound, CriticalBase
from .by_layer import OnLayers, parse_layers
from .dprope import DPRoPE
from .interpolation import NTK, CoPE, DynamicNTK, Linear, NTKFixed, NTKMixed, Resonance
from .lengths import TrainedLength, format_length, parse_length
from .longrope import LongRoPE
from .position_groups import DPE, SelfLogistic
from .positions import DualChunk, JetLong, LeakyReRoPE, ReRoPE, SelfExtend, SinkWindow, String
from .rope import ALL_LAYERS, Facet, Frequencies, RopeSpec, Scaler, compose
from .temperature import InfoScale, LogN, StepLog, Temperature
from .yarn import AlphaRoPE, DynamicYaRN, Llama3, MrRoPE, NTKByParts, YaRN


@dataclass(frozen=True, kw_only=True)
class Auto(Scaler):
    """The length of each request selects the scaler: prompt and `max_new_tokens`, or the scored tokens.

    Up to the trained length L it is the untouched model, bit for bit. Beyond L it is the scaler that `ropewalk tune`
    has found for this model: among the results in the cache folder, the one for the smallest target that is long
    enough. If there is none it is `self-extend:8,window=0.5x`, with a group of 16 for texts longer than 2.25 L, of 32
    from 4.25 L on, and so forth (docs/choose.md gives the reason), or `yarn:F` on a model without support for position
    maps, where F is the ratio of the lengths, rounded up. `model.describe()` names the scaler.

    It cannot be joined with others, and works only on a model that ropewalk runs. Its own methods raise ConfigError.
    """

    name: ClassVar[str] = "auto"
    source: ClassVar[str] = "the length of each request"
    depends_on_length: ClassVar[bool] = True

    def frequencies(self, rope: RopeSpec, length: int | None = None) -> Frequencies:
        _refuse()

    def bands(self, rope: RopeSpec, length: int | None = None) -> tuple[Band, ...]:
        _refuse()

    def logit_factor(self, positions: Tensor, rope: RopeSpec) -> Tensor:
        _refuse()

    def reach(self, rope: RopeSpec) -> float:
        _refuse()

    def check(self, rope: RopeSpec) -> None:
        _refuse()


def _refuse() -> NoReturn:
    raise ConfigError(
        "'auto' selects a scaler by the length of each request, which only a model of ropewalk knows: "
        "rw.load(..., rope='auto') or model.rope = 'auto'; here give one scaler, such as self-extend:8,window=0.5x"
    )


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
        DPRoPE,
        Resonance,
        CoPE,
        ReRoPE,
        LeakyReRoPE,
        SelfExtend,
        DPE,
        SelfLogistic,
        DualChunk,
        String,
        JetLong,
        SinkWindow,
        LogN,
        InfoScale,
        StepLog,
        Temperature,
    )
}


def as_method(name: str, value: object) -> type[Scaler]:
    """`value` as a method, for an entry point of the group `ropewalk.scalers` with this name.

    Raises:
        ConfigError: it is not such a class, or a spec could not name it.
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
"""Every method by its name in a spec: the built-in ones, then those of other packages."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodSummary:
    """A method in a few words.

    Attributes:
        name: name of the method in a spec.
        fields: the fields in order; a field with a default is `name=default`.
        facet: what the method sets; None for `none`, which changes nothing.
        summary: what the method does, in one paragraph.
        source: paper or release.
    """

    name: str
    fields: tuple[str, ...]
    facet: str | None
    summary: str
    source: str

    @classmethod
    def of(cls, name: str, method: type[Scaler]) -> MethodSummary:
        """The summary of a class, from its dataclass fields and its docstring."""
        summary = inspect.cleandoc(method.__doc__ or "").split("\n\n")[0].replace("\n", " ")
        return cls(
            name=name,
            fields=tuple(map(_field, dataclasses.fields(method))),
            facet=method.facet,
            summary=summary if method.facet else "The untouched model.",
            source=method.source,
        )

    def __str__(self) -> str:
        """The spec without optional fields, the facet, and the first sentence of the summary."""
        required = ",".join(field for field in self.fields if "=" not in field)
        spec = f"{self.name}:{required}" if required else self.name
        sentence = textwrap.shorten(re.split(r"(?<=[.])\s", self.summary)[0], 100, placeholder=" ...")
        return f"{spec:<26} {self.facet or '':<16} {sentence}"


class MethodTable(tuple[MethodSummary, ...]):
    """Summaries of methods. `repr` has one line for each."""

    def __repr__(self) -> str:
        return "\n".join(map(str, self))


def scalers() -> MethodTable:
    """Every method that a spec can name, including those of other packages.

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


def parse(spec: str | Scaler | None, trained_length: TrainedLength = None) -> Scaler:
    """The scaler of a spec string. None and `"none"` are the untouched model.

    A spec is one or more methods joined by `|`. A method is `name`, `name:value` or `name:field=value,...`; the first
    value needs no field name. Lists of numbers are joined by `/`. Lengths are 512, 8k (k = 1024) or, if
    the trained length is known, a multiple such as 0.5x. A method for some layers has them at its end, after `@`:
    `OnLayers`. `"auto"` selects a scaler by the length of each request.

    >>> parse("yarn:4").factor
    4.0
    >>> parse("yarn:2@0-9|yarn:4@10-").on(12)
    YaRN(factor=4.0)
    >>> parse("rerope:0.5x", trained_length=8192).window
    4096

    Args:
        spec: the spec. A `Scaler` is returned unchanged.
        trained_length: the tokens of `1x`, which are the length of the model without a scaler (`Model.trained_length`).
            A function that returns it is called only if the spec has a multiple.

    Raises:
        ConfigError: an unknown method or field, a value out of range, two methods on one facet, or a multiple that is
            not a whole number of tokens or whose trained length is not known.
    """
    if spec is None:
        return Scaler()
    if isinstance(spec, Scaler):
        return spec
    if not isinstance(spec, str):
        raise ConfigError(f"a scaler must be a string such as 'yarn:4', not {type(spec).__name__}")
    members = [_parse_part(part, trained_length) for part in spec.split("|")]
    return compose(*(part for member in members for part in member.parts))


def _parse_part(text: str, trained_length: TrainedLength) -> Scaler:
    written, at, layers = text.partition("@")
    method = _parse_method(written, trained_length)
    if not at:
        return method
    found = parse_layers(layers)
    return method if found == ALL_LAYERS else OnLayers(scaler=method, layers=found)


def _parse_method(text: str, trained_length: TrainedLength) -> Scaler:
    name, _, arguments = text.strip().partition(":")
    name = name.strip().lower()
    if not name:
        raise ConfigError("a scaler is empty; 'none' is the untouched model, and 'yarn:4' an example of others")
    if name not in METHODS and name != Auto.name:
        raise ConfigError(f"unknown scaler {name!r}.{did_you_mean(name, [*METHODS.names, Auto.name])}")
    method = Auto if name == Auto.name else METHODS[name]
    fields = {field.name: field for field in dataclasses.fields(method)}
    types_of = typing.get_type_hints(method)
    values: dict[str, Any] = {}
    for position, item in enumerate(filter(None, (a.strip() for a in arguments.split(",")))):
        key, equals, value = (s.strip() for s in item.partition("="))
        if not equals:
            if position > 0 or not fields:
                raise ConfigError(f"{name}: {item!r} needs a field name, as in {_example(name, fields)}")
            key, value = next(iter(fields)), key
        if key not in fields:
            raise ConfigError(f"{name}: unknown field {key!r}.{did_you_mean(key, fields)}")
        if key in values:
            raise ConfigError(f"{name}: {key!r} is given twice")
        if fields[key].metadata.get("length", False):
            values[key] = _parse_length(name, key, value, trained_length)
        else:
            values[key] = _parse_value(name, key, value, types_of[key])
    missing = [k for k, f in fields.items() if f.default is dataclasses.MISSING and k not in values]
    if missing:
        raise ConfigError(f"{name}: needs {', '.join(missing)}, as in {_example(name, fields, short=True)}")
    return method(**values)


def _example(name: str, fields: dict[str, dataclasses.Field[Any]], *, short: bool = False) -> str:
    """A spec of the method with its required fields. `short` leaves out the name of the first field."""
    required = [k for k, f in fields.items() if f.default is dataclasses.MISSING] or list(fields)[:1]
    values = ",".join(k + "=" + ("32k" if fields[k].metadata.get("length") else "4") for k in required)
    if short:
        values = values.removeprefix(f"{next(iter(fields))}=")
    return f"'{name}:{values}'" if values else f"'{name}' (it has no fields)"


def _parse_length(method: str, key: str, text: str, trained_length: TrainedLength) -> int:
    try:
        return parse_length(text, trained_length)
    except ConfigError as error:
        raise ConfigError(f"{method}: {key}: {error}") from None


def _parse_value(method: str, key: str, text: str, annotation: Any) -> Any:
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    try:
        if bool in options:
            return {"true": True, "false": False, "1": True, "0": False}[text.lower()]
        for option in options:
            if typing.get_origin(option) is tuple:
                return tuple(map(typing.get_args(option)[0], text.split("/")))
        return int(text) if int in options else float(text)
    except (KeyError, ValueError):
        kinds = {bool: "true or false", int: "a whole number", float: "a number"}
        kind = next((kinds[o] for o in options if o in kinds), "numbers joined by '/'")
        raise ConfigError(f"{method}: {key}={text!r} is not {kind}") from None
