"""CoPE: the slowest pairs faded out of the rotation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from .rope import Facet, Frequencies, RopeSpec, Scaler


@dataclass(frozen=True, kw_only=True)
class CoPE(Scaler):
    """Soft-clipped RoPE: the n pairs whose wavelength exceeds L, which never completed a turn in training,
    are slowed by (1 + cos x) / 2 with x from 0 to pi over them; the slowest stands still.

    It stretches nothing by itself, so its reach is the trained length; it is meant for models that were
    tuned with it. Source: "CoPE: Clipped RoPE as a Scalable Free Lunch for Long Context LLMs", arXiv 2602.05258.
    """

    name: ClassVar[str] = "cope"
    source: ClassVar[str] = "arXiv 2602.05258"
    facet: ClassVar[Facet] = "frequencies"

    def frequencies(self, rope: RopeSpec, length: int | None = None) -> Frequencies:
        theta = rope.theta
        slow = (2 * math.pi > rope.trained_length * theta) & (theta > 0)  # a pair at rest has no wavelength
        taper = (1 + torch.cos(torch.linspace(0, math.pi, int(slow.sum()), dtype=torch.float64))) / 2
        theta[slow] *= taper
        return Frequencies(theta)
