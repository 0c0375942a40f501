"""What a model is patched with, written on its rotary modules.

Wrappers of a model, its parts and its copies have the same modules or copies of them, and so say it too.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ...scaling.rope import Scaler
from .rotary import RotarySite


def mark(model: nn.Module, sites: Iterable[RotarySite], scaler: Scaler | None) -> None:
    """Note that `model` is under `scaler`; None takes the note away."""
    for site in sites:
        vars(site.module).pop("ropewalk_scaler", None)
        if scaler is not None:
            vars(site.module)["ropewalk_scaler"] = scaler
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            vars(module).pop("save_pretrained", None)
            if scaler is not None and scaler.parts:
                vars(module)["save_pretrained"] = functools.partial(_save, module, scaler)


def patched_with(model: nn.Module) -> Scaler | None:
    """The scaler that a model, what it wraps, or what it was copied from was put under; None for an untouched one."""
    return next((s for module in model.modules() if (s := vars(module).get("ropewalk_scaler")) is not None), None)


def _save(model: PreTrainedModel, scaler: Scaler, *args: Any, **options: Any) -> Any:
    written = scaler.member("positions") is None and scaler.member("temperature") is None
    export = "; ropewalk.export(model, FOLDER) writes a config that has it" if written else ""
    warnings.warn(
        f"save_pretrained writes the weights and the config without the patch {scaler}: what is loaded from them is "
        f"the untouched model, to be patched again{export}",
        stacklevel=2,
    )
    return type(model).save_pretrained(model, *args, **options)
