"""`patch` puts a scaler into a transformers model, and its handle takes the scaler out again.

The record of a patch lies on the model's rotary modules. A wrapper of the model, a part of it or a copy has the same
modules or copies of them, and so the record too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ...errors import ConfigError, PatchError, UnsupportedModel, warn
from ...scaling.by_layer import format_layers, layer_groups
from ...scaling.lengths import format_length, parse_length
from ...scaling.rope import Scaler
from ...scaling.spec import parse
from ..rotary_site import RotarySite, SavedFrequencies, depends_on_length, primary_rotary, rotary_sites
from .band_patch import BandPatch
from .frequency_patch import FrequencyPatch
from .probe import check_frequencies_used
from .temperature_patch import TemperaturePatch

Patch = FrequencyPatch | TemperaturePatch | BandPatch


def install(model: PreTrainedModel, sites: list[RotarySite], scaler: Scaler, *, grows: bool) -> Patch:
    """Put `scaler` into a model by the simplest patch that is exact.

    Args:
        grows: frequencies that depend on the length grow with every sequence. If False, `set_length` of the patch sets
            their length. The scaler none never grows, since it is the model as it is.

    Raises:
        ConfigError: the scaler cannot work on this model.
        UnsupportedModel: the model does not allow the patch that this scaler needs.
    """
    follows = depends_on_length([site for site in sites if not site.is_local], scaler)
    if scaler.differs_by_layer or scaler.member("positions") or (grows and follows and scaler.parts):
        return BandPatch(model, sites, scaler)
    if scaler.member("temperature"):
        return TemperaturePatch(model, sites, scaler)
    writer = FrequencyPatch(model, sites, scaler)
    try:
        writer.set_length()
        if writer.changes_frequencies:
            check_frequencies_used(model, writer.scaled_sites)
    except BaseException:  # also Ctrl-C, which must not leave half a patch
        writer.restore()
        raise
    return writer


@dataclass(frozen=True)
class PatchRecord:
    """The patch in a model.

    Args:
        grows: if the scaler depends on the length, it grows with every sequence.
        length: the fixed length of a scaler that depends on the length and does not grow.
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
    """Record on `model` that it is patched with `scaler`; None removes the record."""
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
    """The record of the patch in a model; None for an unpatched one."""
    return next((s for module in model.modules() if (s := vars(module).get("ropewalk_patch_record")) is not None), None)


def patched_with(model: nn.Module) -> Scaler | None:
    """The scaler that a model is patched with; None for an unpatched one."""
    record = patch_record(model)
    return None if record is None else record.scaler


def _save(model: PreTrainedModel, scaler: Scaler, *args: Any, **options: Any) -> Any:
    export = "" if scaler.differs_by_layer else "; ropewalk.export(model, FOLDER) writes a config that has it"
    warn(
        f"save_pretrained writes the weights and the config without the patch {scaler}, so a model that is loaded from "
        f"them must be patched again{export}",
    )
    return type(model).save_pretrained(model, *args, **options)


class PatchHandle:
    """A patch in a model. It is also a context manager: `with patch(model, "yarn:4"): ...` undoes it at the end.

    Attributes:
        scaler: the scaler that was put in.
        length: the fixed length of a scaler that depends on the length; None if it grows.
        active: True until `undo`.
    """

    def __init__(self, model: PreTrainedModel, installed: Patch, length: int | None, state: SavedFrequencies) -> None:
        self._model = model
        self._installed = installed
        self._state = state
        self.scaler = installed.scaler
        self.length = length
        self.active = True

    @property
    def reach(self) -> float:
        """The most tokens without a distance beyond the trained range."""
        return primary_rotary(self._installed.sites).configured.reach(self.scaler)

    def undo(self) -> None:
        """Restore the model, bit for bit. Do not use caches that were filled under the patch any more.

        If the model was cast meanwhile (`model.bfloat16()`), its frequencies return in the dtype from before the cast,
        as in a model that is loaded in 16 bits. Those of a scaler are never rounded by a cast.

        Raises:
            PatchError: the patch was undone already.
        """
        if not self.active:
            raise PatchError(f"the patch {self.scaler} was undone already")
        self._installed.restore()
        self._state.restore()
        record_patch(self._model, self._installed.sites, None)
        self.active = False

    def describe(self) -> str:
        """The patch in a few lines: scaler, tier, layers, reach, cost."""
        sites = self._installed.scaled_sites
        site = primary_rotary(sites)
        left_alone = [s.layer_type or "" for s in self._installed.sites if s.is_local]
        layers = ", ".join(s.layer_type or "all" for s in sites)
        reach = "any length" if math.isinf(self.reach) else f"{format_length(int(self.reach))} tokens"
        trained = format_length(site.configured.rope.trained_length)
        lines = {
            "scaler": str(self.scaler),
            "tier": self._installed.tier,
            "layers": layers + (f" (left alone: {', '.join(left_alone)})" if left_alone else ""),
            "reach": f"{reach} (trained: {trained}{site.configured.scaling_note})",
        }
        if self.scaler.differs_by_layer:
            count = self._model.config.get_text_config().num_hidden_layers
            for scaler, ranges in layer_groups(self.scaler, count).items():
                details = ", ".join(f"{name} {text}" for name, text in self._details(site, scaler).items())
                lines[f"layers {format_layers(ranges)}"] = f"{scaler}: {details}"
        else:
            lines |= self._details(site, self.scaler)
        lines["cost"] = self._installed.cost
        if site.configured.temperature is not None:
            lines["temperature"] = f"{site.configured.temperature}, the model's own, under every scaler"
        width = max(map(len, lines))
        return "\n".join(f"{name:<{width}}  {text}" for name, text in lines.items())

    def _details(self, site: RotarySite, scaler: Scaler) -> dict[str, str]:
        """Bands, length and factor of a scaler that is the same for all layers."""
        effective, lines = site.configured.effective(scaler), {}
        if scaler.member("positions"):
            lines["bands"] = ", ".join(band.name for band in site.bands(scaler, self.length))
        if effective.depends_on_length:
            step = effective.growing_step(site.configured.rope)
            grows = f"grows with each sequence, in steps of {step} beyond {site.configured.rope.trained_length}"
            grows = grows if self.scaler.parts else "as in transformers: that of the longest text of a batch"
            lines["length"] = grows if self.length is None else f"fixed at {format_length(self.length)} tokens"
        frequencies = effective.frequencies(site.configured.rope, self.length)
        return {**lines, "factor on cos and sin": f"{frequencies.attention_factor:.6g}"}

    def __str__(self) -> str:
        return self.describe() if self.active else f"the patch {self.scaler}, undone"

    def __repr__(self) -> str:
        return f"<PatchHandle {str(self.scaler)!r}, {'active' if self.active else 'undone'}>"

    def __enter__(self) -> PatchHandle:
        return self

    def __exit__(self, *_: object) -> None:
        if self.active:
            self.undo()


def patch(model: PreTrainedModel, scaler: str | Scaler, *, length: int | str | None = None) -> PatchHandle:
    """Put `scaler` into a transformers causal language model, in place.

    The model remains a plain transformers model: `model(...)`, `model.generate(...)`, `model.generate_batch(...)`, any
    cache and training work. Its weights and config do not change. Begin with empty caches.

        handle = patch(model, "ntk:4|rerope:512|logn")
        model.generate(...)
        handle.undo()

    Args:
        model: any transformers model with RoPE whose frequencies follow from its config, with or without a head.
        scaler: a spec string (`ropewalk scalers` lists them) or a scaler. Lengths in a string may be multiples of the
            trained length, as in "rerope:0.5x".
        length: the length of the longest text, such as 16384, "16k" or "2x". A scaler that depends on the length, or a
            dynamic scaling in the model's config, is fixed to it. Without it, such frequencies grow with every sequence
            (under none the model stays as it is). Any other scaler must reach `length`.

    Raises:
        ConfigError: the scaler is wrong, cannot work on this model, or does not reach `length`.
        UnsupportedModel: the model's position encoding cannot be verified.
        PatchError: the model is patched already.
    """
    if not isinstance(model, nn.Module):
        advice = "set its rope" if hasattr(model, "rope") else "load it first with from_pretrained"
        raise ConfigError(f"patch needs a model of transformers, not {model!r:.100}; {advice}")
    if (before := patched_with(model)) is not None:
        raise PatchError(
            f"this model is patched with {before} already; undo that first (for a copy of a patched model this takes a "
            "handle that was copied with it: copy.deepcopy((model, handle)))"
        )
    missing = next((name for name in ("config", "device", "dtype") if not hasattr(model, name)), None)
    if missing is not None:
        raise UnsupportedModel(
            f"{type(model).__name__} has no {missing}, so it is no model of transformers; patch the model inside it, "
            "such as model.module"
        )
    sites = rotary_sites(model)
    site = primary_rotary(sites)
    scaler = parse(scaler, site.configured.max_length)
    tokens = parse_length(str(length), site.configured.max_length) if length is not None else None
    reach = site.configured.reach(scaler)
    if tokens is not None and reach < tokens:
        raise ConfigError(
            f"{scaler} reaches {format_length(int(reach))} tokens on this model, fewer than the "
            f"{format_length(tokens)} asked for; use a larger factor, or rerope, which reaches any length"
        )
    state = SavedFrequencies(sites)
    try:
        installed = install(model, sites, scaler, grows=tokens is None)
        installed.set_length(tokens)
    except BaseException:
        state.restore()
        raise
    record_patch(model, sites, scaler, grows=tokens is None, length=tokens)
    return PatchHandle(model, installed, tokens, state)
