"""The patch for static frequencies: they are written into the model's own rotary modules."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from ...errors import UnsupportedModel
from ...scaling.rope import Scaler
from ..rotary_site import RotarySite, depends_on_length
from .attention_hook import language_model
from .derived import DerivedNumbers

_UNKNOWN = -1  # length of frequencies that are not complete, or not ours


class FrequencyPatch:
    """Writes a scaler's frequencies into a model's rotary modules, and what else the model derives from its rotary
    config where that is; puts the original ones back.

    Writes are exact and reversible: buffers are replaced, never changed, so that `restore` brings the very
    same tensors back.
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
        self.derived = derived_numbers(model, self.scaled_sites, scaler)
        self._originals: list[dict[str, Any]] = []
        self._written_for: int | None = _UNKNOWN

    @property
    def scaled_sites(self) -> list[RotarySite]:
        """The sites that the scaler applies to: all but sliding-window layers."""
        return [site for site in self.sites if not site.is_local]

    @property
    def changes_frequencies(self) -> bool:
        """False for the identity, and for scalers of other facets."""
        return bool(self.scaler.member("frequencies") or self.scaler.member("wavelength grid"))

    def set_length(self, length: int | None = None) -> None:
        """Put the frequencies for a sequence of `length` tokens in place; cheap when they already are."""
        if not depends_on_length(self.scaled_sites, self.scaler):
            length = None
        if self._written_for == length:
            return
        if length is None and not self.changes_frequencies:
            self.restore()
            return
        if not self._originals:
            self._originals = [self._remember(site) for site in self.scaled_sites]
        self._written_for = _UNKNOWN  # after an interruption everything is written again
        for site in self.scaled_sites:
            effective = site.configured.effective(self.scaler)
            frequencies = effective.frequencies(site.configured.rope, length)
            device = site.inv_freq.device
            site.module._buffers[site.attribute("inv_freq")] = frequencies.inv_freq.float().to(device)
            setattr(site.module, site.attribute("attention_scaling"), frequencies.attention_factor)
            # transformers recomputes `dynamic` and `longrope` frequencies inside forward; not while ours are in place
            types: Any = site.module.rope_type
            kept = "default" if site.layer_type is None else {**types, site.layer_type: "default"}
            setattr(site.module, "rope_type", kept)  # noqa: B010  (nn.Module declares tensors only)
        self.derived.apply()
        self._written_for = length

    def apply(self) -> None:
        """Put it back after `restore`."""
        self.set_length()

    def restore(self) -> None:
        """Undo every write; the model is again what it was, to the bit."""
        for site, original in zip(self.scaled_sites, self._originals, strict=False):
            buffer = original["inv_freq"]
            site.module._buffers[site.attribute("inv_freq")] = buffer.to(site.inv_freq.device)
            setattr(site.module, site.attribute("attention_scaling"), original["attention_scaling"])
            site.module.rope_type = original["rope_type"]
        self.derived.restore()
        self._originals = []
        self._written_for = _UNKNOWN

    @staticmethod
    def _remember(site: RotarySite) -> dict[str, Any]:
        return {
            "inv_freq": site.inv_freq,
            "attention_scaling": getattr(site.module, site.attribute("attention_scaling")),
            "rope_type": site.module.rope_type,
        }


def derived_numbers(model: PreTrainedModel, sites: list[RotarySite], scaler: Scaler) -> DerivedNumbers:
    """What the model derives from the rotary config of these sites under `scaler`."""
    return DerivedNumbers(language_model(model), {site.layer_type: site.configured for site in sites}, scaler)
