"""Rotary modules that leave positions alone or tell them, and the attention layers that have to be told.

Most models hand position ids on to their attention function. In the others the rotary module marks what it returns
with the positions it was for, and a layer that is given this finds them there: so they belong to one call, whichever
thread makes it, and in a layer that is computed a second time for its gradients too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from ...errors import PatchError

_now = threading.local()  # `positions`: those of the rotary module or attention layer that this thread entered last


class RotaryHook:
    """A model's rotary modules, made still or made to tell their positions for a while."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules = list(dict.fromkeys(modules))
        self._hooks: list[Any] = []

    def disable_rotation(self, gain: float = 1.0) -> None:
        """Let the modules return cos `gain` and sin 0, so that queries, keys and the cache stay un-rotated."""
        self._hooks += [module.register_forward_hook(DisabledRotation(gain)) for module in self._modules]

    def pass_positions(self, layers: Iterable[nn.Module]) -> None:
        """After `disable_rotation`: give the attention layers the positions that the modules were called with."""
        layers = list(dict.fromkeys(layers))
        if not layers:
            return
        self._hooks += [module.register_forward_hook(_attach_positions, with_kwargs=True) for module in self._modules]
        for layer in layers:
            if not any(module in self._modules for module in layer.modules()):  # else it calls one itself
                self._hooks.append(layer.register_forward_pre_hook(_read_positions, with_kwargs=True))

    def restore(self) -> None:
        """Let the modules rotate as before."""
        while self._hooks:
            self._hooks.pop().remove()

    @contextmanager
    def rotation_disabled(self, gain: float) -> Iterator[None]:
        """`disable_rotation`, for as long as the context lasts."""
        self.disable_rotation(gain)
        try:
            yield
        finally:
            self.restore()


class DisabledRotation:
    """A forward hook of a rotary module: cos `gain`, sin 0."""

    def __init__(self, gain: float) -> None:
        self._gain = gain

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, Tensor) and output.is_complex():
            return torch.full_like(output, self._gain)
        cos, sin = output
        return torch.full_like(cos, self._gain), torch.zeros_like(sin)


def positions_of_call(position_ids: Tensor | None) -> Tensor:
    """Position ids of the queries of an attention call, [1 or B, N]: those given, or what its layer was told.

    Raises:
        PatchError: they are not known.
    """
    found = position_ids if position_ids is not None else _positions_of_thread()
    return found[0] if found.dim() == 3 else found  # [3, B, N] in models that also see pictures; alike for text


_disable: Callable[[Any], Any] = torch.compiler.disable


@_disable
def _positions_of_thread() -> Tensor:
    found: Tensor | None = getattr(_now, "positions", None)
    if found is None:
        raise PatchError(
            "the positions of this call are not known in its attention layers, which are spread over devices; run it "
            "under torch.no_grad(), or give every layer the same device"
        )
    return found


@_disable
def _attach_positions(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    given = [*args, *kwargs.values()]
    positions = next((g for g in given if isinstance(g, Tensor) and not g.is_floating_point()), None)
    if positions is not None:
        _now.positions = positions
        for tensor in _tensors(output):
            tensor.ropewalk_positions = positions  # type: ignore[attr-defined]


@_disable
def _read_positions(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for tensor in _tensors([*args, *kwargs.values()]):
        if (positions := getattr(tensor, "ropewalk_positions", None)) is not None:
            _now.positions = positions
            return
    if torch.is_grad_enabled():  # another forward may have come between
        _now.positions = None


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for one in value:
            yield from _tensors(one)


def visible_keys(mask: Tensor | BlockMask, keys: int) -> Tensor:
    """Bool [B, N, M], or [B, 1, M] where only the last query's row can be told.

    Args:
        mask: [B, 1, N, M], True or 0 for what is seen; [B, M], True or 1 for tokens; or of flex attention.
        keys: M.
    """
    if isinstance(mask, BlockMask):
        device = mask.kv_num_blocks.device
        batch = torch.arange(mask.shape[0], device=device)[:, None, None]
        head = torch.zeros((), dtype=torch.long, device=device)
        seen: Tensor = mask.mask_mod(batch, head, head + mask.seq_lengths[0] - 1, torch.arange(keys, device=device))
        return seen.expand(mask.shape[0], 1, keys)
    if mask.dim() == 2:
        return mask.bool()[:, None]
    return mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] > torch.finfo(mask.dtype).min / 2


def positions_without_padding(positions: Tensor, mask: Tensor | BlockMask | None, keys: int) -> Tensor:
    """Positions that count a row's tokens and not the padding before them, [1 or B, N].

    A query whose position is the place of its key among all keys counts from the first key that it sees.

    Args:
        positions: position ids of the queries, [1 or B, N].
        mask: as an attention function is given it.
        keys: how many there are.
    """
    if mask is None:
        return positions
    seen = visible_keys(mask, keys)
    rows = max(len(seen), len(positions))
    seen, asked = seen.expand(rows, -1, -1), positions[:, -seen.shape[1] :].expand(rows, -1)
    last = seen.shape[2] - 1
    place = asked.clamp(max=last)
    next_seen = seen.gather(2, (place + 1).clamp(max=last)[..., None])[..., 0] & (place < last)
    counted = (asked == place) & seen.gather(2, place[..., None])[..., 0] & ~next_seen
    before = seen.to(torch.uint8).argmax(2)
    return torch.where(counted, (positions - before).clamp(min=0), positions)
