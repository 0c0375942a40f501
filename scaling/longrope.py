"""LongRoPE: one factor for each rotary pair. Any method at a fixed length can be exported in this form."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..errors import ConfigError
from .rope import Factored, Frequencies, RopeSpec, Scaler


@dataclass(frozen=True, kw_only=True)
class LongRoPE(Factored):
    """LongRoPE: theta_i / lambda_i with the `short` list up to L tokens and the `long` list beyond.

    Cos and sin are multiplied by m = sqrt(1 + ln s / ln L) at every length, unless m is given. The length of the
    request selects the list; in a patched model without a given length, the length of each growing sequence
    does. Source: Ding et al., arXiv 2402.13753.

    Args:
        factor: s, at least 1. It sets m and the reach.
        short: lambda_i within L, d/2 numbers above 0.
        long: lambda_i beyond L, d/2 numbers above 0.
        attention_factor: m itself, in place of the rule.
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
        if self.attention_factor is not None and not 0 < self.attention_factor <= 1e9:
            raise ConfigError(f"longrope: attention_factor {self.attention_factor:g} must be above 0 and at most 1e9")

    @property
    def depends_on_length(self) -> bool:  # type: ignore[override]
        return self.short != self.long

    @property
    def brief(self) -> str:
        return f"longrope:{self.factor:g} with {len(self.long)} factors"

    def check(self, rope: RopeSpec) -> None:
        if self.attention_factor is None and rope.trained_length < 2:
            raise ConfigError("longrope: its rule for m needs a trained length of at least 2; give attention_factor")
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


def follows_length(scaler: Scaler) -> bool:
    """True if the frequencies of `scaler` depend on the length of the text."""
    return any(part.depends_on_length for part in scaler.parts if part.facet in ("frequencies", "wavelength grid"))


def fix_length(scaler: Scaler, rope: RopeSpec, length: int) -> Scaler:
    """`scaler` with the frequencies for a text of `length` tokens, for texts of every length.

    They become `LongRoPE` factors, with their factor on cos and sin. A scaler whose frequencies do not depend on the
    length is returned unchanged.

    Args:
        scaler: it sets frequencies and a wavelength grid only.
    """
    if not follows_length(scaler):
        return scaler
    frequencies = scaler.frequencies(rope, length)
    factors = tuple((rope.theta / frequencies.inv_freq).nan_to_num(1.0).tolist())  # 0 / 0: pairs that do not rotate
    return LongRoPE(
        factor=max(length / rope.trained_length, 1.0),
        short=factors,
        long=factors,
        attention_factor=frequencies.attention_factor,
    )
