"""`patch`: give a transformers model that you already have another position scaling, and take it back."""

from __future__ import annotations

import math

from transformers import PreTrainedModel

from ...errors import ConfigError, PatchError, UnsupportedModel
from ...scaling.lengths import format_length, parse_length
from ...scaling.rope import Scaler
from ...scaling.spec import parse
from ..rotary_site import DynamicFrequencies, RotarySite, depends_on_length, primary_rotary, rotary_sites
from .band_patch import BandPatch
from .frequency_patch import FrequencyPatch
from .patch_record import patched_with, record_patch
from .probe import check_written
from .temperature_patch import TemperaturePatch

Patch = FrequencyPatch | TemperaturePatch | BandPatch


def install(model: PreTrainedModel, sites: list[RotarySite], scaler: Scaler, *, grows: bool) -> Patch:
    """Put `scaler` into a model in the simplest way that is exact.

    Args:
        grows: a scaler that depends on length, or the model's own that it leaves in place, follows every sequence, but
            under none; otherwise its length is set by `write`.

    Raises:
        ConfigError: the scaler cannot work on this model.
        UnsupportedModel: the model cannot be patched in the way that this scaler needs.
    """
    follows = depends_on_length([site for site in sites if not site.is_local], scaler)
    if scaler.member("positions") or (grows and follows and scaler.parts):  # none is the model as it is
        return BandPatch(model, sites, scaler)
    if scaler.member("temperature"):
        return TemperaturePatch(model, sites, scaler)
    writer = FrequencyPatch(model, sites, scaler)
    try:
        writer.set_length()
        if writer.changes_frequencies:
            check_written(model, writer)
    except BaseException:  # Ctrl-C too must not leave half a patch
        writer.restore()
        raise
    return writer


class PatchHandle:
    """A patch in place. Also a context manager: `with patch(model, "yarn:4"): ...` undoes it at the end.

    Attributes:
        scaler: what was patched in.
        length: tokens that a scaler which depends on length is fixed to; None where it grows.
        active: True until `undo`.
    """

    def __init__(self, model: PreTrainedModel, installed: Patch, length: int | None, state: DynamicFrequencies) -> None:
        self._model = model
        self._installed = installed
        self._state = state
        self.scaler = installed.scaler
        self.length = length
        self.active = True

    @property
    def reach(self) -> float:
        """Tokens that the model is now meant to carry: up to there no distance leaves the trained range."""
        return primary_rotary(self._installed.sites).configured.reach(self.scaler)

    def undo(self) -> None:
        """Restore the model to what it was before, bit for bit. Caches filled under the patch are void.

        A model that was cast meanwhile (`model.bfloat16()`) gets the frequencies back as they were before the cast, in
        their own dtype, as a model that is loaded in 16 bits has them.

        Raises:
            PatchError: it was undone already.
        """
        if not self.active:
            raise PatchError(f"the patch {self.scaler} was undone already")
        self._installed.restore()
        self._state.restore()
        record_patch(self._model, self._installed.sites, None)
        self.active = False

    def describe(self) -> str:
        """What was done to the model, in a few lines."""
        sites = self._installed.scaled_sites
        site = primary_rotary(sites)
        left_alone = [s.layer_type or "" for s in self._installed.sites if s.is_local]
        layers = ", ".join(s.layer_type or "all" for s in sites)
        reach = "any length" if math.isinf(self.reach) else f"{format_length(int(self.reach))} tokens"
        effective = site.configured.effective(self.scaler)
        frequencies = effective.frequencies(site.configured.rope, self.length)
        lines = {
            "scaler": str(self.scaler),
            "tier": self._installed.tier,
            "layers": layers + (f" (left alone: {', '.join(left_alone)})" if left_alone else ""),
        }
        if self.scaler.member("positions"):
            lines["bands"] = ", ".join(band.name for band in site.bands(self.scaler, self.length))
        if effective.depends_on_length:
            step = effective.growing_step(site.configured.rope)
            grows = f"grows with each sequence, in steps of {step} beyond {site.configured.rope.trained_length}"
            grows = grows if self.scaler.parts else "as transformers has it: that of the longest text of a batch"
            lines["length"] = grows if self.length is None else f"fixed at {format_length(self.length)} tokens"
        trained = format_length(site.configured.rope.trained_length)
        lines |= {
            "reach": f"{reach} (trained: {trained}{site.configured.scaling_note})",
            "factor on cos and sin": f"{frequencies.attention_factor:.6g}",
            "cost": self._installed.cost,
        }
        width = max(map(len, lines))
        return "\n".join(f"{name:<{width}}  {text}" for name, text in lines.items())

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

    The model goes on as a plain transformers model: `model(...)`, `model.generate(...)`, any cache, training.
    Its weights and config are not touched.

        handle = patch(model, "ntk:4|rerope:512|logn")
        model.generate(...)
        handle.undo()

    Args:
        model: any transformers model with RoPE that computes its frequencies as its config says, with a head or
            without.
        scaler: a spec string (`ropewalk scalers` lists them) or a scaler; lengths in a string may be multiples of the
            trained one, as in "rerope:0.5x".
        length: the longest text to come, such as 16384, "16k" or "2x". A scaler that depends on length, or a dynamic
            scaling of the model's own, is fixed to it; without it, it grows with every sequence of its own (under none
            the model is left as it is). Any other must reach it.

    Raises:
        ConfigError: the scaler is wrong, cannot work on this model, or does not reach `length`.
        UnsupportedModel: the model's position encoding cannot be verified.
        PatchError: the model is patched already.
    """
    if (before := patched_with(model)) is not None:
        raise PatchError(
            f"this model is patched with {before} already; undo that first (a copy of a patched model is undone by a "
            "handle that was copied with it: copy.deepcopy((model, handle)))"
        )
    missing = next((name for name in ("config", "device", "dtype") if not hasattr(model, name)), None)
    if missing is not None:
        raise UnsupportedModel(
            f"{type(model).__name__} has no {missing}, so it is no model of transformers; patch the one inside, such "
            "as model.module"
        )
    sites = rotary_sites(model)
    site = primary_rotary(sites)
    scaler = parse(scaler, site.configured.max_length)
    tokens = parse_length(str(length), site.configured.max_length) if length is not None else None
    reach = site.configured.reach(scaler)
    if tokens is not None and reach < tokens:
        raise ConfigError(
            f"{scaler} reaches {format_length(int(reach))} tokens on this model, fewer than the "
            f"{format_length(tokens)} asked for; take a larger factor, or rerope, which reaches any length"
        )
    state = DynamicFrequencies(sites)
    try:
        installed = install(model, sites, scaler, grows=tokens is None)
        installed.set_length(tokens)
    except BaseException:
        state.restore()
        raise
    record_patch(model, sites, scaler, grows=tokens is None, length=tokens)
    return PatchHandle(model, installed, tokens, state)
