"""Llama 3.1's scaling: by wavelength instead of by pair."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ..errors import ConfigError
from .rope import Factored, Frequencies, RopeSpec


@dataclass(frozen=True, kw_only=True)
class Llama3(Factored):
    """Llama 3: wavelengths above L / low_freq_factor are stretched by s, those below L / high_freq_factor
    kept, and between them theta_i is interpolated linearly in L / wavelength.

    Source: the Llama 3.1 release, 2024 (factor 8, low 1, high 4, L 8192).

    Args:
        factor: s, at least 1.
        low_freq_factor: fewest turns over L at which a pair is not fully stretched.
        high_freq_factor: turns over L from which a pair is kept.
    """

    name: ClassVar[str] = "llama3"
    source: ClassVar[str] = "Llama 3.1, 2024"
    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.inf > self.high_freq_factor > self.low_freq_factor > 0:
            raise ConfigError(
                f"llama3: high_freq_factor {self.high_freq_factor:g} must be above "
                f"low_freq_factor {self.low_freq_factor:g}, and both finite and above 0"
            )

    def frequencies(self, rope: RopeSpec, length: int | None = None) -> Frequencies:
        rotations = rope.trained_length * rope.theta / (2 * math.pi)
        kept = ((rotations - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return Frequencies(rope.theta * (1 - (1 - kept) * (1 - 1 / self.factor)))
