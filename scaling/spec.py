"""Spec strings: `yarn:4`, `ntk-mixed:factor=8,b=0.625`, `ntk:4|resonance`; `parse(str(s)) == s`."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

from ..errors import ConfigError, did_you_mean
from .auto import Auto
from .lengths import TrainedLength, parse_length
from .methods import METHODS
from .rope import Scaler, compose


def parse(spec: str | Scaler | None, trained_length: TrainedLength = None) -> Scaler:
    """The scaler that `spec` names. None and `"none"` are the untouched model.

    A spec is one or more methods joined by `|`; a method is `name`, `name:value` or `name:field=value,...`,
    where the first value may go without its field name. Lists of numbers are joined by `/`. Lengths read 512, 8k
    (k = 1024) or, where the trained length is known, 0.5x of it. `"auto"` leaves the choice to each request's length.

    >>> parse("yarn:4").factor
    4.0
    >>> parse("rerope:0.5x", trained_length=8192).window
    4096

    Args:
        spec: of the scaler; one that is a scaler already is returned.
        trained_length: tokens that `1x` means: what the model reads without any scaler (`Model.trained_length`). A
            function that finds them out is called only if the spec has a multiple.

    Raises:
        ConfigError: unknown method or field, a value out of range, two methods on one facet, or a multiple where the
            trained length is not known or the product is no whole number.
    """
    if spec is None:
        return Scaler()
    if isinstance(spec, Scaler):
        return spec
    if not isinstance(spec, str):
        raise ConfigError(f"a scaler is written as a string such as 'yarn:4', not as {type(spec).__name__}")
    members = [_parse_method(part, trained_length) for part in spec.split("|")]
    return compose(*(part for member in members for part in member.parts))


def _parse_method(text: str, trained_length: TrainedLength) -> Scaler:
    name, _, arguments = text.strip().partition(":")
    name = name.strip().lower()
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
    """A spec with every field that it needs; a `short` one leaves out the name of the first field, as may be done."""
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
        if any(typing.get_origin(option) is tuple for option in options):
            return tuple(float(number) for number in text.split("/"))
        return int(text) if int in options else float(text)
    except (KeyError, ValueError):
        kinds = {bool: "true or false", int: "a whole number", float: "a number"}
        kind = next((kinds[o] for o in options if o in kinds), "numbers joined by '/'")
        raise ConfigError(f"{method}: {key}={text!r} is not {kind}") from None
