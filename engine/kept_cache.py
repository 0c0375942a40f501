"""A cache that is kept from request to request."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers.cache_utils import Cache

from ..tokenizer_tools.cover import shared_length
from .cache import can_rewind, layers_agree, tokens_read
from .network import Setting

if TYPE_CHECKING:
    from .api import Model


class KeptCache:
    """A cache with the tokens that it holds, under whatever scaler: cropped and turned to what is read next.

    So it can never be wrong, only empty.

    Attributes:
        ids: the tokens held.
        cache: None while there is nothing to keep.
        setting: the scaler that the keys are turned for, and its length.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self.ids: list[int] = []
        self.cache: Cache | None = None
        self.setting = model.network.setting

    def shared(self, ids: list[int]) -> int:
        """Tokens that it holds of the beginning of `ids`."""
        return shared_length(self.ids, ids)

    def ready(self, certain: list[int], length: int) -> Cache:
        """The cache under the scaler in use, holding no more than the beginning it shares with `certain`.

        The last token is left out: it is run again, to see what follows it.

        Args:
            length: tokens that it is going to hold.
        """
        network = self._model.network
        with self._model.turn:
            self._model.prepare(length)
            if self.setting != network.setting:
                self._retune()
            self.setting = network.setting
        self.settle(self.ids[: self.shared(certain[:-1])])
        if self.cache is None:
            self.cache = network.new_cache(length)
        return self.cache

    def _retune(self) -> None:
        cache, ids = self.cache, self.ids
        self.clear()  # half turned keys would be of no scaler
        if cache is None:
            return
        with torch.inference_mode():
            if self._model.network.retune(cache, self.setting):
                self.cache, self.ids = cache, ids

    def settle(self, known: list[int], broken: bool = False) -> None:
        """Keep what the cache holds of `known`, in all layers alike.

        Args:
            broken: a step was broken off (Ctrl-C), maybe between two layers.
        """
        cache = self.cache
        self.clear()
        if cache is None:
            return
        if can_rewind(cache):
            lengths = [tokens_read(layer) for layer in cache.layers]
            held = min([len(known), *lengths])
            if not (layers_agree(cache) and can_rewind(cache, max(lengths, default=0) - held)):
                return
            for layer, length in zip(cache.layers, lengths, strict=True):
                layer.crop(held - length)
        else:
            held = tokens_read(cache)
            if broken or held > len(known):
                return
        self.cache, self.ids = cache, known[:held]

    def hold(self, cache: Cache, ids: list[int], setting: Setting) -> None:
        """Take over a cache with what it holds."""
        self.cache, self.ids, self.setting = cache, ids, setting

    def clear(self) -> None:
        """Give the memory back."""
        self.cache, self.ids = None, []
