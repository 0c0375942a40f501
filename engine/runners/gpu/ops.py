"""The operations of a decode step beside its matrix products: what they compute, and on what.

There are two forms with the same results: tensor operations (`reference.py`) and Triton kernels (`kernels/`). Neither
waits for the device: sizes come from shapes, and everything that changes from step to step is read on the device. A
CUDA graph can record them.

Shape suffixes: N tokens of the step, E hidden size, H query heads, K key-value heads, D head dim, I inner size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from ...attention.rotation import Layout
from ...kv_cache import KVLayer

Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True, kw_only=True)
class CacheRows:
    """Where the keys and values of each token are, in one layer. Tokens are rows of a batch or of one sequence.

    Args:
        layers: the cache of each token. Its buffers are contiguous, [1, K, capacity, D].
        addresses: their addresses on the device, int64 [N, 2, 3]: for keys and for values, the address of the
            numbers, the address of their scales (or 0), and the capacity in tokens.
        slots: the place in the cache of the token's own key, int64 [N].
    """

    layers: Sequence[KVLayer]
    addresses: Tensor
    slots: Tensor

    @classmethod
    def of(cls, layers: Sequence[KVLayer], slots: Tensor) -> CacheRows:
        """The rows of these caches. The addresses are copied to the device of `slots`."""
        addresses = torch.tensor([layer.addresses for layer in layers], device=slots.device)
        return cls(layers=layers, addresses=addresses, slots=slots)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of keys and values: float32, float16, bfloat16 or int8."""
        return self.layers[0].shape.dtype


@dataclass(frozen=True, kw_only=True)
class StepBands:
    """What the queries of a step see, and how they are rotated, in a group of layers (`RotationTable`).

    Without a position map there is one band.

    Args:
        queries: cosines and sines of the queries in every band, times the attention factor, float32
            [bands, N, 2, half].
        edges: the first key that a query sees in every band and the key after the last one, int32 [N, bands, 2]. No
            key lies between them if the second is not larger. Every query sees a key.
        scales: the factor on the scores of every query, float32 [N].
        shifts: for every band, the cosines and sines by which it rotates the stored key at position j when it reads
            it, in row j, float32 [positions, 2, half]; None for a band that reads keys as they are.
    """

    queries: Tensor
    edges: Tensor
    scales: Tensor
    shifts: tuple[Tensor | None, ...]


@dataclass(frozen=True, kw_only=True)
class TokenTree:
    """Tokens that continue one sequence along several paths. Positions and slots differ.

    Args:
        start: the length of the sequence. Before it, the key at position j is in slot j.
        ancestors: the slots of a token's ancestors and its own, int32 [N, depth]. The key that token n sees at
            position j >= start is in slot ancestors[n, j - start]. Entries after the token's own are not used.
    """

    start: int
    ancestors: Tensor


class Ops(Protocol):
    """The operations. Their arguments are on one device."""

    def add_norm(
        self,
        x_NE: Tensor,
        delta_NE: Tensor | None,
        after_E: Tensor | None,
        before_E: Tensor | None,
        epsilon: float,
        dtype: torch.dtype,
    ) -> Tensor:
        """Add the output of a block to the hidden states, and norm them for the next block.

        The norms are RMS norms in float32 (float64 where `x_NE` is).

        Args:
            x_NE: float32; changed in place.
            delta_NE: what to add; None adds nothing.
            after_E: weights of its norm, float32, or None.
            before_E: weights of the norm of the sum, float32; None only converts it.
            dtype: of the result.

        Returns:
            The normed sum, [N, E].
        """

    def heads(
        self,
        qkv: Tensor,
        H: int,
        K: int,
        query_norm: Tensor | None,
        key_norm: Tensor | None,
        whole: bool,
        epsilon: float,
        key_angles: Tensor,
        layout: Layout | None,
        rows: CacheRows,
    ) -> Tensor:
        """Norm queries and keys, rotate the keys, and write keys and values into the cache.

        Args:
            qkv: projected queries, keys and values, [N, (H + 2 K) D].
            query_norm, key_norm: weights of the RMS norms, float32: [D], or [H D] and [K D] if `whole`; or None.
            whole: the norm is over all heads at once, and not over each head.
            key_angles: cosines and sines of the stored keys, times the attention factor, float32 [N, 2, half].
            layout: the places of the rotary pairs; None rotates nothing.
            rows: an int8 cache gets the codes and scales of `kv_cache.int8_rows`.

        Returns:
            The normed queries, not rotated, [N, H, D] in the dtype of `qkv`. It can be a view of `qkv`.
        """

    def attention(
        self,
        q_NHD: Tensor,
        rows: CacheRows,
        bands: StepBands,
        layout: Layout | None,
        softcap: float | None,
        tree: TokenTree | None = None,
    ) -> Tensor:
        """Attention of every query on its cache, which holds its own key already.

        Args:
            q_NHD: queries that are not rotated yet; the numbers of a token are contiguous.
            layout: the places of the rotary pairs; None rotates nothing.
            softcap: c in c tanh(score / c), which caps the scaled scores; or None.
            tree: where the keys of the last positions are; None if every key's slot is its position.

        Returns:
            [N, H D] in the dtype of `q_NHD`.
        """

    def int8_linear(self, x_NI: Tensor, weight_RI: Tensor, scale_R: Tensor) -> Tensor:
        """The product with int8 weights, each row of which has a float32 scale: x weight^T * scale, [N, R] in the
        dtype of `x_NI`. Few tokens: the weights are read once and not widened in memory."""

    def gate(self, gate_up: Tensor, activation: Activation) -> Tensor:
        """activation(gate) * up, of the two halves of `gate_up` [N, 2 I]: [N, I] in its dtype."""
