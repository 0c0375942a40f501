"""The fields that the recipes of all measurements share: the model, its scaler and the text."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from ...scaling.rope import Scaler
from ...scaling.spec import Auto
from ..models.measured import MeasuredModel


class NamedText(Protocol):
    """A text as recipes name it: a `Text` or a `Source`."""

    @property
    def name(self) -> str: ...
    @property
    def sha256(self) -> str: ...


def shared_recipe(model: MeasuredModel, text: NamedText | None) -> dict[str, Any]:
    """The fields of the model and the text."""
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
    """The fields of the scaler.

    Args:
        rope_at: gives the scaler at a length. For `auto` that depends on what was tuned, so the
            recipe holds it.
        lengths: in tokens.
    """
    if not isinstance(scaler, Auto):
        return {"rope": str(scaler)}
    return {"rope": str(scaler), "chosen": ", ".join(dict.fromkeys(str(rope_at(length)) for length in lengths))}
