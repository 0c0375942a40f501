"""Position maps with groups of several sizes: by rotary pairs (DPE), or growing along the text (SELF)."""

from __future__ import annotations

import functools
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import ConfigError
from .band import Band, near_and_far
from .positions import PositionScaler
from .rope import RopeSpec


@dataclass(frozen=True, kw_only=True)
class DPE(PositionScaler):
    """DPE: Self-Extend with a group size of its own for each block of rotary pairs.

    Bands: distance < W at (i, j); the rest at (i // G + W - W // G, j // G), where G is the size for the pair's block.
    The d/2 pairs are divided into equal blocks, the fastest first. It reaches the text whose distances stay below L in
    the pairs that completed no rotation over L. For Llama-3-8B its authors take W = 1024 and
    4/4/2/16/32/32/16/128. They also leave some dimensions of some heads as they are, chosen by a measurement, which
    this does not. Source: Lu et al., arXiv 2504.18857.

    Args:
        groups: G of every block of pairs, joined by `/`; their number divides d/2.
        window: W in tokens, below L.
    """

    name: ClassVar[str] = "dpe"
    source: ClassVar[str] = "arXiv 2504.18857"
    groups: tuple[int, ...]
    window: int = field(metadata={"length": True})

    def __post_init__(self) -> None:
        self._check_positive(window=self.window)
        if not self.groups or min(self.groups) < 1:
            raise ConfigError("dpe: groups must be sizes of at least 1, joined by '/', as in 4/4/2/16")

    def check(self, rope: RopeSpec) -> None:
        self._check_below("window", self.window, rope)
        if rope.dim // 2 % len(self.groups):
            raise ConfigError(
                f"dpe: {len(self.groups)} groups cannot divide the {rope.dim // 2} rotary pairs of this model into "
                "equal blocks"
            )

    def reach(self, rope: RopeSpec) -> float:
        L, W = rope.trained_length, self.window
        blocks = rope.theta.view(len(self.groups), -1)
        unfinished = [G for G, theta in zip(self.groups, blocks, strict=True) if theta.min() * L < 2 * math.pi]
        return min((L - W + W // G) * G for G in unfinished or self.groups)

    def bands(self, rope: RopeSpec, length: int | None = None) -> tuple[Band, ...]:
        W, size = self.window, rope.dim // 2 // len(self.groups)

        def of_pairs(blocks: list[Tensor]) -> Tensor:
            return torch.stack(blocks, -1).repeat_interleave(size, -1).double()

        def query(i: Tensor) -> Tensor:
            return of_pairs([i // G + W - W // G for G in self.groups])

        def key(j: Tensor) -> Tensor:
            return of_pairs([j // G for G in self.groups])

        return near_and_far(W, query, key)


@dataclass(frozen=True, kw_only=True)
class SelfLogistic(PositionScaler):
    """SELF: Self-Extend with groups that grow logistically, from 1 token to C - 1.

    Group k has floor(C / (1 + (C - 1) e^(-r k))) tokens, and g(x) is the group of token x. Bands: distance < W at
    (i, j); the rest at (W + g(i - W), g(j)). The groups count from the start of the text. The public code does so when
    it reads a prompt; for a new token it counts them from that token backwards, which no rotation of keys can give.
    Source: Dang et al., arXiv 2505.17296.

    Args:
        window: W in tokens, below L.
        rate: r, 0.001 to 10.
        capacity: C, 2 (the untouched distances) to 1024.
    """

    name: ClassVar[str] = "self-logistic"
    source: ClassVar[str] = "arXiv 2505.17296"
    window: int = field(metadata={"length": True})
    rate: float = 0.02
    capacity: int = 33

    def __post_init__(self) -> None:
        self._check_positive(window=self.window)
        if not 1e-3 <= self.rate <= 10:
            raise ConfigError(f"self-logistic: rate {self.rate:g} must be 0.001 to 10")
        if not 2 <= self.capacity <= 1024:
            raise ConfigError(f"self-logistic: capacity {self.capacity} must be 2 to 1024")

    def check(self, rope: RopeSpec) -> None:
        self._check_below("window", self.window, rope)

    def reach(self, rope: RopeSpec) -> float:
        rest, tokens = rope.trained_length - self.window, 0
        for size, count in _growing_groups(self.rate, self.capacity):
            tokens += size * min(count, rest)
            rest -= min(count, rest)
        return self.window + tokens + rest * (self.capacity - 1)

    def bands(self, rope: RopeSpec, length: int | None = None) -> tuple[Band, ...]:
        W, growing, largest = self.window, _growing_groups(self.rate, self.capacity), self.capacity - 1

        def group(x: Tensor) -> Tensor:
            index, first = torch.zeros_like(x), 0
            for size, count in growing:
                index = index + (x - first).clamp(0, size * count) // size
                first += size * count
            return (index + (x - first).clamp(min=0) // largest).double()

        def query(i: Tensor) -> Tensor:
            return W + group((i - W).clamp(min=0))

        return near_and_far(W, query, group)


@functools.lru_cache(maxsize=64)
def _growing_groups(rate: float, capacity: int) -> tuple[tuple[int, int], ...]:
    """The sizes below `capacity` - 1 in order, each with its number of groups. All later groups have `capacity` - 1."""
    counts: Counter[int] = Counter()
    for k in range(1 << 20):
        size = math.floor(capacity / (1 + (capacity - 1) * math.exp(-rate * k)))
        if size >= capacity - 1:
            break
        counts[size] += 1
    return tuple(counts.items())
