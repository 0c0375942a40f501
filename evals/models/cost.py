"""The arithmetic of forward passes, from which progress bars and time limits are computed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ...engine.model import Model

Advance = Callable[[int, int], None]
"""Called as tokens are read: the number of tokens in the cache, and the number read on top of
them."""


@dataclass(frozen=True, kw_only=True)
class ForwardCost:
    """Operations of a forward pass: `dense` for each token, `attention` for each token and key."""

    dense: float
    attention: float

    @classmethod
    def of(cls, model: Model) -> ForwardCost:
        """The cost of a loaded model, from the shapes of its weights."""
        embedding = model.hf.get_input_embeddings().weight.numel()
        return cls._of(model.hf.config, sum(p.numel() for p in model.hf.parameters()) - embedding)

    @classmethod
    def of_config(cls, config: Any) -> ForwardCost:
        """An estimate without the weights: each layer counts as 12 matrices of the hidden size
        squared."""
        text = config.get_text_config()
        return cls._of(config, 12 * text.num_hidden_layers * text.hidden_size**2)

    @classmethod
    def _of(cls, config: Any, weights: int) -> ForwardCost:
        config = config.get_text_config()
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(dense=2 * weights, attention=4 * config.num_hidden_layers * config.num_attention_heads * head_dim)

    def step(self, past: int, tokens: int) -> float:
        """Operations of `tokens` tokens on top of `past` tokens in the cache."""
        return tokens * (self.dense + self.attention * (past + tokens / 2))

    def passes(self, windows: Iterable[int]) -> float:
        """Operations of forward passes over windows of these lengths."""
        return sum(self.step(0, tokens) for tokens in windows)
