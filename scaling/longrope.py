"""LongRoPE: one searched factor per pair, and the form in which any static method can be exported."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..errors import ConfigError
from .rope import Factored, Frequencies, RopeSpec


@dataclass(frozen=True, kw_only=True)
class LongRoPE(Factored):
    """LongRoPE: theta_i / lambda_i with the `short` list up to L tokens and the `long` list beyond.

    m = sqrt(1 + ln s / ln L) on cos and sin, at every length, unless given. Which list holds is decided
    by the length of a request; in a patched model, unless a length is given, by that of each growing
    sequence. Source: Ding et al., arXiv 2402.13753.

    Args:
        factor: s, at least 1; sets m and the reach.
        short: lambda_i within L, d/2 numbers above 0.
        long: lambda_i beyond L, d/2 numbers above 0.
        attention_factor: m itself, instead of the rule.
    """

    name: ClassVar[str] = "longrope"
    source: ClassVar[str] = "arXiv 2402.13753"
    short: tuple[float, ...]
    long: tuple[float, ...]
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for label, factors in (("short", self.short), ("long", self.long)):
            if not factors or not all(math.inf > number > 0 for number in factors):
                raise ConfigError(f"longrope: {label} must be finite numbers above 0, one for each rotary pair")
        if self.attention_factor is not None and not math.inf > self.attention_factor > 0:
            raise ConfigError(f"longrope: attention_factor {self.attention_factor:g} must be finite and above 0")

    @property
    def depends_on_length(self) -> bool:  # type: ignore[override]
        return self.short != self.long

    def check(self, rope: RopeSpec) -> None:
        for label, factors in (("short", self.short), ("long", self.long)):
            if len(factors) != rope.dim // 2:
                raise ConfigError(
                    f"longrope: {label} has {len(factors)} numbers; rotary dimension {rope.dim} needs {rope.dim // 2}"
                )

    def temperature(self, rope: RopeSpec) -> float:
        """m, the factor on cos and sin."""
        if self.attention_factor is not None:
            return self.attention_factor
        return math.sqrt(1 + math.log(self.factor) / math.log(rope.trained_length))

    def frequencies(self, rope: RopeSpec, length: int | None = None) -> Frequencies:
        factors = self.long if (length or 0) > rope.trained_length else self.short
        return Frequencies(rope.theta / torch.tensor(factors, dtype=torch.float64), self.temperature(rope))
