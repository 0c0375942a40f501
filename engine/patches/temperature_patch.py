"""The patch for a temperature alone: queries are multiplied in front of the model's own attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...errors import UnsupportedModel
from ...scaling.rope import Scaler
from .probe import logits
from .rotary import RotarySite, RotaryWriter, headline
from .seam import AttentionSeam, RotarySeam


class TemperaturePatch:
    """Frequencies in the rotary modules, and t(i) on the queries of every layer that sees the whole past.

    Raises:
        UnsupportedModel: attention does not go through transformers' registry.
    """

    tier = "temperature: queries are multiplied in front of the model's own attention kernel"
    cost = "one multiplication of the queries a layer"

    def __init__(self, model: PreTrainedModel, sites: list[RotarySite], scaler: Scaler) -> None:
        self._model = model
        self.sites = sites
        self.scaler = scaler
        self._frequencies = RotaryWriter(model, sites, scaler)
        self.scaled_sites = self._frequencies.scaled_sites
        self.derived = self._frequencies.derived
        self._seam = AttentionSeam(model)
        self._rotary = RotarySeam([site.module for site in sites])
        self._padding: Tensor | None = None
        self._calls = 0
        try:
            self._install()
        except BaseException:  # Ctrl-C too must not leave half a patch
            self.restore()
            raise

    def _install(self) -> None:
        self.apply()
        logits(self._model)
        if not self._calls:
            raise UnsupportedModel(
                f"{type(self._model).__name__} does not call attention through transformers' attention registry, so a "
                "temperature cannot be patched in; static frequency scalers such as yarn:4 can"
            )

    def apply(self) -> None:
        """Put it in place; after `restore` too, without looking at the model anew."""
        self._hook = self._model.register_forward_pre_hook(self._begin)
        self._rotary.watch()
        self._seam.install(self._attention, self._mask)
        self.write(None)

    def write(self, length: int | None = None) -> None:
        """Put the frequencies for a sequence of `length` tokens in place."""
        self._frequencies.write(length)

    def restore(self) -> None:
        """Give the model back its frequencies and its attention; it is what it was, to the bit."""
        self._hook.remove()
        self._frequencies.restore()
        self._rotary.restore()
        self._seam.remove()

    def _begin(self, *_: Any) -> None:
        self._padding = None  # a mask with four dimensions says nothing of padding, and `_mask` never sees it

    def _mask(self, *args: Any, attention_mask: Tensor | None = None, **others: Any) -> Any:
        self._padding = attention_mask
        return self._seam.own_mask(*args, attention_mask=attention_mask, **others)

    def _attention(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **others: Any
    ) -> tuple[Tensor, Tensor | None]:
        self._calls += 1
        if others.get("sliding_window") is None:
            given = others.get("position_ids")
            positions = given if given is not None else self._rotary.positions
            assert positions is not None
            factor = headline(self.sites).logit_factor(self.scaler, self._own_positions(positions))
            query = (query * factor[:, None, :, None]).to(query.dtype)
        return self._seam.own_attention(module)(module, query, key, value, attention_mask, **others)

    def _own_positions(self, positions: Tensor) -> Tensor:
        """Positions that count a row's tokens and not the padding before them."""
        padding = self._padding
        if padding is None or padding.shape[0] < positions.shape[0]:
            return positions
        before = padding.int().argmax(1, keepdim=True)
        counted = positions[:, -1:] == padding.shape[1] - 1
        return torch.where(counted, (positions - before).clamp(min=0), positions)
