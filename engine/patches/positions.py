"""Disables the rotation of rotary modules, and passes the positions of a call to attention.

Most models pass position ids to their attention function. In other models, a hook attaches the positions to the output
of the rotary module, and a second hook reads them when this output reaches an attention layer. So positions belong to
one call, also with several threads, and when gradient checkpointing runs a layer again.
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

_thread = threading.local()  # `positions`: of the rotary module or attention layer that this thread entered last


class RotaryHook:
    """Hooks on a model's rotary modules. They disable the rotation, and pass positions on, until `restore`."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules = list(dict.fromkeys(modules))
        self._hooks: list[Any] = []

    def disable_rotation(self, gain: float = 1.0) -> None:
        """Make the modules return cos `gain` and sin 0, so that queries, keys and the cache stay un-rotated."""
        self._hooks += [module.register_forward_hook(DisabledRotation(gain)) for module in self._modules]

    def pass_positions(self, layers: Iterable[nn.Module]) -> None:
        """Pass the positions of each call of the modules to attention layers. Call it after `disable_rotation`."""
        layers = list(dict.fromkeys(layers))
        if not layers:
            return
        self._hooks += [module.register_forward_hook(_attach_positions, with_kwargs=True) for module in self._modules]
        for layer in layers:
            if not any(module in self._modules for module in layer.modules()):  # else the layer calls one itself
                self._hooks.append(layer.register_forward_pre_hook(_read_positions, with_kwargs=True))

    def restore(self) -> None:
        """Make the modules rotate as before."""
        while self._hooks:
            self._hooks.pop().remove()

    @contextmanager
    def rotation_disabled(self, gain: float) -> Iterator[None]:
        """`disable_rotation` within this context."""
        self.disable_rotation(gain)
        try:
            yield
        finally:
            self.restore()


class DisabledRotation:
    """A forward hook of a rotary module that returns cos `gain` and sin 0."""

    def __init__(self, gain: float) -> None:
        self._gain = gain

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, Tensor) and output.is_complex():
            return torch.full_like(output, self._gain)
        cos, sin = output
        return torch.full_like(cos, self._gain), torch.zeros_like(sin)


def positions_of_call(position_ids: Tensor | None) -> Tensor:
    """Position ids of the queries of an attention call, [1 or B, N]: the given ones, or those passed to its layer.

    Raises:
        PatchError: they are not known.
    """
    positions = position_ids if position_ids is not None else _positions_of_thread()
    return positions[0] if positions.dim() == 3 else positions  # [3, B, N] in models with images, equal for text


_disable: Callable[[Any], Any] = torch.compiler.disable


@_disable
def _positions_of_thread() -> Tensor:
    positions: Tensor | None = getattr(_thread, "positions", None)
    if positions is None:
        raise PatchError(
            "the attention layers do not know the positions of this call, because they are on several devices; run it "
            "under torch.no_grad(), or put all layers on one device"
        )
    return positions


@_disable
def _attach_positions(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    arguments = [*args, *kwargs.values()]
    positions = next((a for a in arguments if isinstance(a, Tensor) and not a.is_floating_point()), None)
    if positions is not None:
        _thread.positions = positions
        for tensor in _tensors(output):
            tensor.ropewalk_positions = positions  # type: ignore[attr-defined]


@_disable
def _read_positions(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for tensor in _tensors([*args, *kwargs.values()]):
        if (positions := getattr(tensor, "ropewalk_positions", None)) is not None:
            _thread.positions = positions
            return
    if torch.is_grad_enabled():  # with gradients, another forward pass may have run in between
        _thread.positions = None


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


def visible_keys(mask: Tensor | BlockMask, keys: int) -> Tensor:
    """The keys that each query sees, bool [B, N, M]; or [B, 1, M], for the last query, if the mask has no more.

    Args:
        mask: [B, 1, N, M], True or 0 for visible keys; or [B, M], True or 1 for tokens; or a mask of flex attention.
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
    """Positions that count the tokens of a row, and not the padding before them, [1 or B, N].

    If the position of a query is the index of its key among all keys, it is counted from the first visible key.

    Args:
        positions: position ids of the queries, [1 or B, N].
        mask: the mask of the attention call.
        keys: the number of keys.
    """
    if mask is None:
        return positions
    seen = visible_keys(mask, keys)
    rows = max(len(seen), len(positions))
    seen, given = seen.expand(rows, -1, -1), positions[:, -seen.shape[1] :].expand(rows, -1)
    last = seen.shape[2] - 1
    place = given.clamp(max=last)
    next_seen = seen.gather(2, (place + 1).clamp(max=last)[..., None])[..., 0] & (place < last)
    counted = (given == place) & seen.gather(2, place[..., None])[..., 0] & ~next_seen
    before = seen.to(torch.uint8).argmax(2)
    return torch.where(counted, (positions - before).clamp(min=0), positions)
