"""A scaler as its spec string; `spec.py` reads these."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from .lengths import format_length

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def format_spec(name: str, scaler: DataclassInstance) -> str:
    """The spec string of one method with the fields of `scaler`; those at their default are left out."""
    values = []
    for position, field in enumerate(dataclasses.fields(scaler)):
        value = getattr(scaler, field.name)
        if value == field.default:
            continue
        text = _format_value(value, is_length=field.metadata.get("length", False))
        values.append(text if position == 0 else f"{field.name}={text}")
    return name + (":" + ",".join(values) if values else "")


def _format_value(value: Any, *, is_length: bool) -> str:
    if is_length:
        return format_length(value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "/".join(_format_value(v, is_length=False) for v in value)
    if isinstance(value, float) and value == int(value) and abs(value) < 1e15:
        return str(int(value))
    return repr(value)
