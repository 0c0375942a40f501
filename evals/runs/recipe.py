"""What every recipe of a measurement holds: the model, how it runs, and the text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from ...scaling.auto import Auto
from ...scaling.rope import Scaler


class Measured(Protocol):
    """What a recipe tells of a model: a `Subject` or a `Reader`."""

    @property
    def name(self) -> str: ...
    @property
    def precision(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def trained_length(self) -> int | None: ...
    @property
    def metadata(self) -> Mapping[str, Any]: ...


class Named(Protocol):
    """What a recipe tells of a text: a `Text` or a `Source`."""

    @property
    def name(self) -> str: ...
    @property
    def sha256(self) -> str: ...


def shared_recipe(model: Measured, text: Named | None) -> dict[str, Any]:
    """The fields that all recipes of a model and a text share."""
    return {
        "model": model.name,
        "text": None if text is None else text.name,
        "text_sha256": None if text is None else text.sha256,
        "dtype": model.precision,
        "device": model.device,
        "trained_length": model.trained_length,
        **model.metadata,
    }


def rope_recipe(scaler: Scaler, rope_at: Callable[[int], Scaler], lengths: Iterable[int]) -> dict[str, str]:
    """The fields that tell the scaler.

    Args:
        rope_at: what runs at a length; for `auto` that depends on what was tuned, so the recipe holds it.
        lengths: in tokens.
    """
    if not isinstance(scaler, Auto):
        return {"rope": str(scaler)}
    return {"rope": str(scaler), "chosen": ", ".join(dict.fromkeys(str(rope_at(length)) for length in lengths))}
