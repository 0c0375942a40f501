"""The patch for a temperature alone: queries are multiplied in front of the model's own attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ...scaling.hf import is_local
from ...scaling.rope import Scaler
from ..rotary_site import RotarySite, primary_rotary
from .attention_hook import AttentionHook, own_attention, own_mask
from .frequency_patch import FrequencyPatch
from .positions import RotaryHook, own_positions, positions_of_call
from .probe import untold_layers


class TemperaturePatch:
    """Frequencies in the rotary modules, and t(i) on the queries of every layer that sees the whole past.

    Raises:
        UnsupportedModel: attention does not go through transformers' registry.
    """

    tier = "temperature: queries are multiplied in front of the model's own attention kernel"
    cost = "one multiplication of the queries a layer"

    def __init__(self, model: PreTrainedModel, sites: list[RotarySite], scaler: Scaler) -> None:
        self.sites = sites
        self.scaler = scaler
        self._frequencies = FrequencyPatch(model, sites, scaler)
        self.scaled_sites = self._frequencies.scaled_sites
        self.derived = self._frequencies.derived
        self._seam = AttentionHook(model)
        self._rotary = RotaryHook(site.module for site in sites)
        self._untold = untold_layers(model)
        try:
            self.apply()
        except BaseException:  # Ctrl-C too must not leave half a patch
            self.restore()
            raise

    def apply(self) -> None:
        """Put it in place; after `restore` too, without looking at the model anew."""
        self._rotary.tell(self._untold)
        self._seam.install(self)
        self.write(None)

    def write(self, length: int | None = None) -> None:
        """Put the frequencies for a sequence of `length` tokens in place."""
        self._frequencies.write(length)

    def restore(self) -> None:
        """Give the model back its frequencies and its attention; it is what it was, to the bit."""
        self._frequencies.restore()
        self._rotary.restore()
        self._seam.remove()

    def mask(self, *args: Any, **others: Any) -> Any:
        """The mask that the model would build."""
        return own_mask(*args, **others)

    def attention(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **others: Any
    ) -> tuple[Tensor, Tensor | None]:
        """The model's own attention, of queries that are multiplied by the temperature at their positions."""
        if others.get("sliding_window") is None and not _sees_a_window(module):
            positions = own_positions(positions_of_call(others.get("position_ids")), attention_mask, key.shape[2])
            factor = primary_rotary(self.sites).logit_factor(self.scaler, positions)
            query = (query * factor[:, None, :, None]).to(query.dtype)
        return own_attention(module)(module, query, key, value, attention_mask, **others)


def _sees_a_window(module: nn.Module) -> bool:
    kinds = getattr(module.config, "layer_types", None) or []
    index = getattr(module, "layer_idx", None)
    return index is not None and 0 <= index < len(kinds) and is_local(kinds[index])
