"""Turning queries and keys: where the rotary pairs of a head lie, and the rotation itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Angles(NamedTuple):
    """Cosines and sines of pair angles, each [..., N, d/2]; a factor on attention is multiplied in."""

    cos: Tensor
    sin: Tensor


@dataclass(frozen=True)
class Layout:
    """Which numbers of a head form the d/2 pairs that are rotated.

    Args:
        start: first number that is rotated; those before it, and from start + dim on, are not.
        dim: d, rotated numbers.
        interleaved: pairs are neighbours (2n, 2n + 1) instead of halves (n, n + d/2).
    """

    start: int
    dim: int
    interleaved: bool

    def rotate(self, x: Tensor, angles: Angles) -> Tensor:
        """`x` [..., N, D] rotated, in its own dtype; the arithmetic is at least float32."""
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
        before, behind = (part.expand(*both.shape[:-1], -1) for part in unrotated)
        return torch.cat((before, both.to(x.dtype), behind), -1)


def angles(positions: Tensor, inv_freq: Tensor, *, factor: float = 1.0, like: Tensor) -> Angles:
    """Cosines and sines at real-valued `positions` (float64 [...]), times `factor`: [..., d/2].

    Computed in float64 and rounded once: float32 angles are off by 0.01 rad at position 100,000.

    Args:
        inv_freq: radians per position, float64 [d/2].
        like: device and dtype of what will be rotated; 16-bit ones get float32.
    """
    phases = positions[..., None] * inv_freq.to(positions.device)
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    cos, sin = ((f(phases) * factor).to(like.device, dtype) for f in (torch.cos, torch.sin))
    return Angles(cos, sin)
