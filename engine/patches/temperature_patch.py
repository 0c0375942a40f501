"""The patch for a temperature without a position map. It multiplies queries before the model's own attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ...scaling.rope import Scaler
from ..rotary_site import RotarySite, primary_rotary
from .attention_hook import AttentionHook, unpatched_attention, unpatched_mask
from .frequency_patch import FrequencyPatch
from .positions import RotaryHook, positions_of_call, positions_without_padding
from .probe import has_local_type, layers_without_positions


class TemperaturePatch:
    """Writes frequencies into the rotary modules, and multiplies the queries by t(i) in layers without a window.

    Raises:
        UnsupportedModel: the model does not use transformers' attention registry.
    """

    tier = "temperature: queries are multiplied before the model's own attention kernel"
    cost = "one multiplication of the queries a layer"

    def __init__(self, model: PreTrainedModel, sites: list[RotarySite], scaler: Scaler) -> None:
        self.sites = sites
        self.scaler = scaler
        self._frequencies = FrequencyPatch(model, sites, scaler)
        self.scaled_sites = self._frequencies.scaled_sites
        self.derived = self._frequencies.derived
        self._hook = AttentionHook(model)
        self._rotary = RotaryHook(site.module for site in sites)
        self._without_positions = layers_without_positions(model)
        try:
            self.apply()
        except BaseException:  # also Ctrl-C, which must not leave half a patch
            self.restore()
            raise

    def apply(self) -> None:
        """Put the patch in place. After `restore` this needs no new check of the model."""
        self._rotary.pass_positions(self._without_positions)
        self._hook.install(self)
        self.set_length(None)

    def set_length(self, length: int | None = None) -> None:
        """Write the frequencies for a sequence of `length` tokens."""
        self._frequencies.set_length(length)

    def restore(self) -> None:
        """Restore the model's frequencies and attention. The model is then what it was, bit for bit."""
        self._frequencies.restore()
        self._rotary.restore()
        self._hook.remove()

    def mask(self, *args: Any, **others: Any) -> Any:
        """The mask that the unpatched model builds."""
        return unpatched_mask(*args, **others)

    def attention(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **others: Any
    ) -> tuple[Tensor, Tensor | None]:
        """The model's own attention. The queries are first multiplied by the temperature at their positions."""
        if others.get("sliding_window") is None and not has_local_type(module, module.config):
            positions = positions_without_padding(
                positions_of_call(others.get("position_ids")), attention_mask, key.shape[2]
            )
            factor = primary_rotary(self.sites).logit_factor(self.scaler, positions)
            query = (query * factor[:, None, :, None]).to(query.dtype)
        return unpatched_attention(module)(module, query, key, value, attention_mask, **others)
