"""The step of single tokens on a GPU: one upload, and one CUDA graph for each number of tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...kv_cache import KVCache, addresses_of
from ..decoder_runner import Rows
from ..family import Decoder
from .angles import StepAngles
from .decoder import DeviceDecoder
from .ops import CacheRows, Ops, TokenTree

Replay = Callable[[], Tensor]

_MOST_CAPTURED = 32  # tokens of a step that becomes a graph; larger ones are run operation by operation
_WARM_UPS = 3  # runs before a capture, in which libraries allocate their workspaces


@functools.cache
def _side_stream(_device: int) -> Any:
    """The stream of all captures on a device. cuBLAS keeps a workspace of 32 MB for each stream that it has met."""
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


def capture(run: Replay) -> Replay:
    """A CUDA graph of `run` on the current device. Replaying it computes on the same memory, and returns the same
    tensor. Other threads may use the device meanwhile."""
    side = _side_stream(torch.cuda.current_device())
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UPS):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
        out = run()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


class _Inputs:
    """What a step of N tokens reads, int64, in one buffer on the device: a step uploads it in one copy.

    The kernels read the addresses of a layer and the slots. Both lie at multiples of 16 bytes for every N, so that
    Triton compiles one form of them.
    """

    @torch.inference_mode()
    def __init__(self, tokens: int, layers: int, device: torch.device) -> None:
        size = layers * tokens * 6 + 3 * tokens
        self._host = torch.empty(size, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._device = torch.zeros(size, dtype=torch.int64, device=device)
        addresses, slots, ids, positions = torch.split(self._device, [6 * layers * tokens, tokens, tokens, tokens])
        self.addresses = addresses.view(layers, tokens, 2, 3)
        self.slots, self.ids, self.positions = slots, ids, positions

    @torch.inference_mode()  # a graph that was made in this mode may be used outside of it
    def fill(self, *parts: Any) -> None:
        """Upload addresses, slots, ids and positions."""
        np.concatenate([np.asarray(part, np.int64).ravel() for part in parts], out=self._host.numpy())
        self._device.copy_(self._host)


class DecodeStep:
    """Runs single tokens of any sequences under one scaler.

    Args:
        groups: the angles of every group of layers, and `group_of` the index of every layer's group.
        captures: makes a function with fixed memory repeatable at low cost, as `capture` does. None runs it each time.
    """

    def __init__(
        self,
        decoder: Decoder,
        layers: DeviceDecoder,
        ops: Ops,
        groups: list[StepAngles],
        group_of: list[int],
        captures: Callable[[Replay], Replay] | None,
    ) -> None:
        self._decoder, self._layers, self._ops = decoder, layers, ops
        self._groups, self._group_of = groups, group_of
        self._captures = captures
        self._graphs: dict[int, tuple[_Inputs, Replay]] = {}

    def run(self, rows: Rows, positions: list[int], tree: tuple[int, list[list[int]]] | None) -> Tensor:
        """Run the tokens of `rows`, and write their keys and values. The caches do not count them yet.

        Args:
            positions: of the tokens, in order.
            tree: as `DecoderRunner.tree` gives it, if the tokens form a tree.

        Returns:
            The logits after every token, [N, V].
        """
        moved = [group.reserve(max(positions) + 1) for group in self._groups]
        if any(moved):
            self._graphs.clear()
        ids = [token for tokens, _ in rows for token in tokens]
        caches = [cache for tokens, cache in rows for _ in tokens]
        slots = [cache.length + k for tokens, cache in rows for k in range(len(tokens))]
        for tokens, cache in rows:
            cache.reserve(len(tokens))
        fill = (addresses_of(caches), slots, ids, positions)
        if tree is not None or self._captures is None or len(ids) > _MOST_CAPTURED:
            inputs = self._inputs(len(ids))
            inputs.fill(*fill)
            return self._compute(inputs, caches, None if tree is None else self._on_device(tree))
        if len(ids) not in self._graphs:
            inputs = self._inputs(len(ids))
            inputs.fill(*fill)
            self._graphs[len(ids)] = inputs, self._captures(lambda: self._compute(inputs, caches, None))
        inputs, replay = self._graphs[len(ids)]
        inputs.fill(*fill)
        return replay().clone()

    def _inputs(self, tokens: int) -> _Inputs:
        return _Inputs(tokens, len(self._decoder.layers), self._decoder.final_norm.device)

    def _on_device(self, tree: tuple[int, list[list[int]]]) -> TokenTree:
        start, paths = tree
        depth = max(map(len, paths))
        table = torch.tensor([path + [path[-1]] * (depth - len(path)) for path in paths], dtype=torch.int32)
        return TokenTree(start=start, ancestors=table.to(self._decoder.final_norm.device))

    def _compute(self, inputs: _Inputs, caches: list[KVCache], tree: TokenTree | None) -> Tensor:
        """The step on the device.

        Args:
            caches: of every token. A graph follows the addresses, and not these objects.
        """
        d, ops = self._decoder, self._ops
        groups = [group.at(inputs.positions) for group in self._groups]

        def mix(index: int, qkv: Tensor) -> Tensor:
            layer, group = d.layers[index], self._group_of[index]
            (bands, key_angles), layout = groups[group], self._groups[group].layout
            rows = CacheRows(
                addresses=inputs.addresses[index],
                slots=inputs.slots,
                layers=[cache.layers[index] for cache in caches],
            )
            query_norm, key_norm = layer.norms[4:]
            q = ops.heads(
                qkv, d.heads, d.key_heads, query_norm, key_norm, d.norms_whole, d.epsilon, key_angles, layout, rows
            )
            return ops.attention(q, rows, bands, layout, layer.softcap, tree)

        return self._layers.logits(*self._layers.run(inputs.ids, mix))
