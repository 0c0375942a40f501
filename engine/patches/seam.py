"""The places where a transformers model lets itself be changed: rotary modules and the attention registry.

Every current model turns queries and keys by what its rotary module returns, and then calls an attention
function looked up by name. Both are replaced here, for one model at a time, and put back.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...errors import UnsupportedModel

AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]
MaskFunction = Callable[..., Any]

_numbers = itertools.count(1)


class AttentionSeam:
    """An attention function of ours in a model, and the model's own behind it."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._config = model.config.get_text_config()
        self.original: str = self._config._attn_implementation
        self.name = f"ropewalk_{next(_numbers)}"

    def install(self, attention: AttentionFunction, mask: MaskFunction) -> None:
        """Have the model call `attention` and build its masks with `mask`."""
        AttentionInterface.register(self.name, attention)
        AttentionMaskInterface.register(self.name, mask)
        self._config._attn_implementation = self.name

    def remove(self) -> None:
        """Have the model call its own attention again."""
        self._config._attn_implementation = self.original
        for interface in (AttentionInterface, AttentionMaskInterface):
            interface._global_mapping.pop(self.name, None)

    def own_attention(self, module: nn.Module) -> AttentionFunction:
        """What the model would call for `module`."""
        if self.original == "eager":
            found = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
            if found is None:
                raise UnsupportedModel(
                    f"{type(module).__name__} has no eager attention function to fall back on; "
                    'load the model with attn_implementation="sdpa"'
                )
            return found  # type: ignore[no-any-return]
        return ALL_ATTENTION_FUNCTIONS[self.original]  # type: ignore[no-any-return]

    def own_mask(self, *args: Any, **kwargs: Any) -> Any:
        """The mask that the model would build."""
        return ALL_MASK_ATTENTION_FUNCTIONS[self.original](*args, **kwargs)


class RotarySeam:
    """A rotary module that turns nothing for a while, and remembers the positions it was asked for."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self._modules = list(dict.fromkeys(modules))
        self.positions: Tensor | None = None
        self._watchers: list[Any] = []
        self._replaced: list[tuple[nn.Module, Any]] = []  # with the forward that was set on it, such as accelerate's

    def watch(self) -> None:
        """Remember the position ids of every call."""

        def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = [*args, *kwargs.values()]
            found = [g for g in given if isinstance(g, Tensor) and not g.is_floating_point()]
            if found:  # [3, B, N] in models that also see pictures; alike for text
                self.positions = found[0][0] if found[0].dim() == 3 else found[0]

        self._watchers = [m.register_forward_pre_hook(see, with_kwargs=True) for m in self._modules]

    def still(self, gain: float = 1.0) -> None:
        """Let the modules return cos `gain` and sin 0, so that queries, keys and the cache stay un-rotated."""
        for module in self._modules:
            self._replaced.append((module, module.__dict__.get("forward")))
            module.forward = _still(module.forward, gain)

    def restore(self) -> None:
        """Let the modules turn as before."""
        self._put_back()
        for watcher in self._watchers:
            watcher.remove()

    @contextmanager
    def stilled(self, gain: float) -> Iterator[None]:
        """`still`, for as long as the context lasts."""
        self.still(gain)
        try:
            yield
        finally:
            self._put_back()

    def _put_back(self) -> None:
        while self._replaced:
            module, forward = self._replaced.pop()
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.forward = forward


def _still(forward: Callable[..., Any], gain: float) -> Callable[..., Any]:
    def still(*args: Any, **kwargs: Any) -> Any:
        turns = forward(*args, **kwargs)
        if isinstance(turns, Tensor) and turns.is_complex():
            return torch.full_like(turns, gain)
        cos, sin = turns
        return torch.full_like(cos, gain), torch.zeros_like(sin)

    return still
