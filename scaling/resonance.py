"""Resonance RoPE: wavelengths moved to whole numbers of tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from .rope import Frequencies, WavelengthGrid


@dataclass(frozen=True, kw_only=True)
class Resonance(WavelengthGrid):
    """Rounds every wavelength 2pi / theta_i to an integer, so that rotations repeat exactly; laid over any
    frequency method (`yarn:4|resonance`), whose temperature it keeps.

    Source: Wang et al., arXiv 2403.00071.
    """

    name: ClassVar[str] = "resonance"
    source: ClassVar[str] = "arXiv 2403.00071"

    def lay_over(self, host: Frequencies) -> Frequencies:
        wavelengths = 2 * math.pi / host.inv_freq
        return Frequencies(2 * math.pi / torch.round(wavelengths).clamp(min=1), host.attention_factor)
