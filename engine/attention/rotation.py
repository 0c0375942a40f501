"""One rotation of queries or keys: where the rotary pairs are in a head, and their angles.

`banded.py` decides at which positions keys are rotated under a position map (ReRoPE, Self-Extend, Dual Chunk).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Angles(NamedTuple):
    """Cosines and sines of the pairs' angles, each [..., N, d/2], times the attention factor."""

    cos: Tensor
    sin: Tensor


class Copies:
    """A small tensor, copied once to each device that reads it."""

    def __init__(self, tensor: Tensor) -> None:
        self._copies = {tensor.device: tensor}
        self._tensor = tensor

    def on(self, device: torch.device) -> Tensor:
        """The tensor on `device`."""
        if device not in self._copies:
            self._copies[device] = self._tensor.to(device)
        return self._copies[device]


@dataclass(frozen=True)
class Layout:
    """The numbers of a head that form the d/2 rotated pairs.

    Args:
        start: the first rotated number. The numbers before it, and those from start + dim on, are not rotated.
        dim: d, the count of rotated numbers.
        interleaved: a pair is two neighbours (2n, 2n + 1), and not one number of each half (n, n + d/2).
    """

    start: int
    dim: int
    interleaved: bool

    def rotate(self, x: Tensor, angles: Angles) -> Tensor:
        """Rotate `x` [..., N, D]. The result has the dtype of `x`; the arithmetic is at least float32."""
        rotating = x[..., self.start : self.start + self.dim].to(angles.cos.dtype)
        if self.interleaved:
            a, b = rotating[..., 0::2], rotating[..., 1::2]
        else:
            a, b = rotating.chunk(2, dim=-1)
        rotated = (
            torch.addcmul(a * angles.cos, b, angles.sin, value=-1),
            torch.addcmul(b * angles.cos, a, angles.sin),
        )
        both = torch.stack(rotated, -1).flatten(-2) if self.interleaved else torch.cat(rotated, -1)
        if self.dim == x.shape[-1]:
            return both.to(x.dtype)
        unrotated = (x[..., : self.start], x[..., self.start + self.dim :])
        before, after = (part.expand(*both.shape[:-1], -1) for part in unrotated)
        return torch.cat((before, both.to(x.dtype), after), -1)


def angles(positions: Tensor, inv_freq: Tensor, *, factor: float = 1.0, like: Tensor) -> Angles:
    """Cosines and sines, times `factor`, at real-valued `positions`: [..., d/2].

    They are computed in float64 and rounded once. Angles in float32 are wrong by 0.01 rad at position 100,000.

    Args:
        positions: float64, [..., d/2] for each pair or [..., 1] for all.
        inv_freq: radians per position, float64 [d/2].
        like: the tensor to rotate; the angles have its device, and its dtype or float32 if that has 16 bits.
    """
    return cos_sin(positions * inv_freq.to(positions.device), factor=factor, like=like)


def cos_sin(phases: Tensor, *, factor: float = 1.0, like: Tensor) -> Angles:
    """Cosines and sines, times `factor`, of `phases` in radians (float64), in the dtype that `angles` gives."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    cos, sin = ((f(phases) * factor).to(like.device, dtype) for f in (torch.cos, torch.sin))
    return Angles(cos, sin)
