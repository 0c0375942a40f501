"""What a model is patched with, written on its rotary modules.

Wrappers of a model, its parts and its copies have the same modules or copies of them, and so say it too.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ...scaling.rope import Scaler
from ..rotary_site import RotarySite


@dataclass(frozen=True)
class PatchRecord:
    """What was put into a model.

    Args:
        scaler: the patch.
        grows: where it depends on the length, it follows every sequence.
        length: tokens that it is fixed to, where it depends on the length and does not grow.
    """

    scaler: Scaler
    grows: bool = False
    length: int | None = None


def record_patch(
    model: nn.Module,
    sites: Iterable[RotarySite],
    scaler: Scaler | None,
    *,
    grows: bool = False,
    length: int | None = None,
) -> None:
    """Note that `model` is under `scaler`, which grows or is fixed to a length; None takes the note away."""
    for site in sites:
        vars(site.module).pop("ropewalk_patch_record", None)
        if scaler is not None:
            vars(site.module)["ropewalk_patch_record"] = PatchRecord(scaler, grows, length)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            vars(module).pop("save_pretrained", None)
            if scaler is not None and scaler.parts:
                vars(module)["save_pretrained"] = functools.partial(_save, module, scaler)


def patch_record(model: nn.Module) -> PatchRecord | None:
    """What a model, what it wraps, or what it was copied from was put under; None for an untouched one."""
    return next((s for module in model.modules() if (s := vars(module).get("ropewalk_patch_record")) is not None), None)


def patched_with(model: nn.Module) -> Scaler | None:
    """The scaler of `setting_of`."""
    setting = patch_record(model)
    return None if setting is None else setting.scaler


def _save(model: PreTrainedModel, scaler: Scaler, *args: Any, **options: Any) -> Any:
    written = scaler.member("positions") is None and scaler.member("temperature") is None
    export = "; ropewalk.export(model, FOLDER) writes a config that has it" if written else ""
    warnings.warn(
        f"save_pretrained writes the weights and the config without the patch {scaler}: what is loaded from them is "
        f"the untouched model, to be patched again{export}",
        stacklevel=2,
    )
    return type(model).save_pretrained(model, *args, **options)
