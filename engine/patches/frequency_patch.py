"""The patch for static frequencies. It writes them into the model's own rotary modules."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ...errors import UnsupportedModel
from ...scaling.rope import Scaler
from ..rotary_site import RotarySite, depends_on_length
from .derived import DerivedNumbers

_UNKNOWN = -1  # no frequencies of ours are in place, or only some of them
_WRITTEN = "ropewalk_frequencies"  # attribute of a rotary module: our buffers by name


class FrequencyPatch:
    """Writes a scaler's frequencies into a model's rotary modules, and restores the original ones.

    Numbers that the model derives from its rotary config are changed too. Buffers are replaced and never changed in
    place, so `restore` brings back the same tensors.
    """

    tier = "static frequencies, written into the model's own rotary modules; every attention kernel works"
    cost = "none"

    def __init__(self, model: PreTrainedModel, sites: list[RotarySite], scaler: Scaler) -> None:
        self.sites = sites
        self.scaler = scaler
        if not self.scaled_sites:
            raise UnsupportedModel(
                "all layers of this model that use RoPE see a sliding window only, so no distance grows with the "
                "context and there is nothing to scale"
            )
        for site in self.scaled_sites:
            site.configured.check(scaler)
        self.derived = DerivedNumbers(model, self.scaled_sites, scaler)
        self._originals: list[dict[str, Any]] = []
        self._hooks: list[Any] = []
        self._written_for: int | None = _UNKNOWN

    @property
    def scaled_sites(self) -> list[RotarySite]:
        """The sites that the scaler changes: those of layers without a sliding window."""
        return [site for site in self.sites if not site.is_local]

    @property
    def changes_frequencies(self) -> bool:
        """False for a scaler without frequencies and without a wavelength grid."""
        return bool(self.scaler.member("frequencies") or self.scaler.member("wavelength grid"))

    def set_length(self, length: int | None = None) -> None:
        """Write the frequencies for a sequence of `length` tokens. Does nothing if they are written already."""
        if not depends_on_length(self.scaled_sites, self.scaler):
            length = None
        if self._written_for == length:
            return
        if length is None and not self.changes_frequencies:
            self.restore()
            return
        if not self._originals:
            self._originals = [self._remember(site) for site in self.scaled_sites]
            modules = dict.fromkeys(site.module for site in self.scaled_sites)
            self._hooks = [module.register_forward_pre_hook(_put_back) for module in modules]
        self._written_for = _UNKNOWN  # an interruption here makes the next call write everything again
        for site in self.scaled_sites:
            effective = site.configured.effective(self.scaler)
            frequencies = effective.frequencies(site.configured.rope, length)
            written = frequencies.inv_freq.float().to(site.inv_freq.device)
            site.module._buffers[site.attribute("inv_freq")] = written
            vars(site.module).setdefault(_WRITTEN, {})[site.attribute("inv_freq")] = written
            setattr(site.module, site.attribute("attention_scaling"), frequencies.attention_factor)
            # `forward` recomputes `dynamic` and `longrope` frequencies, but must not replace ours
            types: Any = site.module.rope_type
            static = "default" if site.layer_type is None else {**types, site.layer_type: "default"}
            setattr(site.module, "rope_type", static)  # noqa: B010  (nn.Module declares tensors only)
        self.derived.apply()
        self._written_for = length

    def apply(self) -> None:
        """Put the patch back after `restore`."""
        self.set_length()

    def restore(self) -> None:
        """Undo every write. The model is then what it was, bit for bit."""
        for hook in self._hooks:
            hook.remove()
        for site, original in zip(self.scaled_sites, self._originals, strict=False):
            buffer = original["inv_freq"]
            site.module._buffers[site.attribute("inv_freq")] = buffer.to(site.inv_freq.device)
            setattr(site.module, site.attribute("attention_scaling"), original["attention_scaling"])
            site.module.rope_type = original["rope_type"]
            vars(site.module).pop(_WRITTEN, None)
        self.derived.restore()
        self._originals, self._hooks = [], []
        self._written_for = _UNKNOWN

    @staticmethod
    def _remember(site: RotarySite) -> dict[str, Any]:
        return {
            "inv_freq": site.inv_freq,
            "attention_scaling": getattr(site.module, site.attribute("attention_scaling")),
            "rope_type": site.module.rope_type,
        }


def _put_back(module: nn.Module, _args: Any) -> None:
    """Put our frequencies in the place of a copy that a cast of the model has rounded."""
    ours = vars(module).get(_WRITTEN, {})
    for name, written in ours.items():
        buffer: Any = module._buffers[name]
        if buffer is not written and not buffer.is_meta:
            module._buffers[name] = ours[name] = written.to(buffer.device)
