"""YaRN, Llama 3 and their relatives: fast pairs unchanged, slow pairs interpolated, a ramp between.

Pair i makes L * theta_i / 2pi turns over the trained length. Pairs with more than `beta_fast` turns have
seen every angle and are left alone; pairs with fewer than `beta_slow` have not and are slowed by s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import ConfigError
from .rope import Facet, Factored, Frequencies, RopeSpec, Scaler


def pair_with_rotations(rope: RopeSpec, rotations: float) -> float:
    """The (real-valued) pair index that makes `rotations` turns over the trained length."""
    return rope.dim * math.log(rope.trained_length / (2 * math.pi * rotations)) / (2 * math.log(rope.base))


def ramp_ends(rope: RopeSpec, beta_fast: float, beta_slow: float, truncate: bool) -> tuple[float, float]:
    """Pair indices between which a ramp runs: the last kept pair and the first slowed one."""
    low, high = pair_with_rotations(rope, beta_fast), pair_with_rotations(rope, beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = (min(max(end, 0), rope.dim - 1) for end in (low, high))
    return low, high if high != low else high + 0.001


def yarn_temperature(factor: float, mscale: float = 1.0) -> float:
    """0.1 * mscale * ln s + 1: the factor on cos and sin that YaRN fitted for LLaMA; 1 at s = 1."""
    return 0.1 * mscale * math.log(factor) + 1.0


def _pair_indices(rope: RopeSpec) -> Tensor:
    return torch.arange(rope.dim // 2, dtype=torch.float64)


def _by_parts(rope: RopeSpec, factor: float, beta_fast: float, beta_slow: float, truncate: bool) -> Tensor:
    low, high = ramp_ends(rope, beta_fast, beta_slow, truncate)
    r = ((_pair_indices(rope) - low) / (high - low)).clamp(0, 1)
    return rope.theta * (1 - r * (1 - 1 / factor))


def _check_betas(name: str, beta_fast: float, beta_slow: float) -> None:
    if not 1e100 >= beta_fast > beta_slow >= 1e-100:
        raise ConfigError(
            f"{name}: beta_fast {beta_fast:g} must be above beta_slow {beta_slow:g}, and both finite and above 0 "
            "(1e-100 to 1e100)"
        )


@dataclass(frozen=True, kw_only=True)
class NTKByParts(Factored):
    """NTK-by-parts: theta_i (1 - r_i) + theta_i / s * r_i, r_i = clamp((i - low) / (high - low), 0, 1).

    low and high are the pairs with `beta_fast` and `beta_slow` turns. These are YaRN's frequencies without
    its temperature, as section 3.2 of arXiv 2309.00071 defines the method; the code that circulated before
    the paper mixed in NTK-aware frequencies at two further thresholds and is not this.

    Args:
        factor: s, target length over trained length, at least 1.
        beta_fast: turns above which a pair is kept.
        beta_slow: turns below which a pair is slowed by s.
        truncate: round the ramp's ends outwards to whole pairs, as the public code does.
    """

    name: ClassVar[str] = "ntk-by-parts"
    source: ClassVar[str] = "arXiv 2309.00071 section 3.2"
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_betas(self.name, self.beta_fast, self.beta_slow)

    def frequencies(self, rope: RopeSpec, length: int | None = None) -> Frequencies:
        return Frequencies(_by_parts(rope, self.factor, self.beta_fast, self.beta_slow, self.truncate))


@dataclass(frozen=True, kw_only=True)
class YaRN(NTKByParts):
    """YaRN: NTK-by-parts frequencies with cos and sin multiplied by m = 0.1 ln s + 1 (logits by m^2).

    Source: Peng et al., arXiv 2309.00071.

    Args:
        factor: s, target length over trained length, at least 1.
        beta_fast: turns above which a pair is kept.
        beta_slow: turns below which a pair is slowed by s.
        truncate: round the ramp's ends outwards to whole pairs.
        attention_factor: m itself, instead of the rule.
        mscale: with `mscale_all_dim`, m is the ratio of (0.1 mscale ln s + 1) and (0.1 mscale_all_dim ln s + 1).
        mscale_all_dim: see `mscale`. Alone or beside `attention_factor` it leaves m as it is. Models with latent
            attention, such as DeepSeek-V3, multiply all logits by (0.1 mscale_all_dim ln s + 1)^2 besides.
    """

    name: ClassVar[str] = "yarn"
    source: ClassVar[str] = "arXiv 2309.00071"
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("attention_factor", "mscale", "mscale_all_dim"):
            value = getattr(self, key)
            if value is not None and not math.inf > value > 0:
                raise ConfigError(f"yarn: {key} {value:g} must be finite and above 0")
        if self.mscale is not None and self.mscale_all_dim is None:
            raise ConfigError("yarn: mscale and mscale_all_dim go together; give both or neither")
        if self.attention_factor is not None and self.mscale is not None:
            raise ConfigError("yarn: attention_factor and mscale both set m; give one of them")

    def temperature(self) -> float:
        """m, the factor on cos and sin."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale is not None and self.mscale_all_dim is not None:
            return yarn_temperature(self.factor, self.mscale) / yarn_temperature(self.factor, self.mscale_all_dim)
        return yarn_temperature(self.factor)

    def frequencies(self, rope: RopeSpec, length: int | None = None) -> Frequencies:
        return Frequencies(super().frequencies(rope, length).inv_freq, self.temperature())


@dataclass(frozen=True, kw_only=True)
class DynamicYaRN(Scaler):
    """Dynamic YaRN: YaRN with s = max(1, len / L), frequencies and m alike; plain within L.

    Source: the `dynamic` variant of jquesnelle/yarn; arXiv 2309.00071 section 3.3.

    Args:
        beta_fast: turns above which a pair is kept.
        beta_slow: turns below which a pair is slowed by s.
        truncate: round the ramp's ends outwards to whole pairs.
        step: tokens in a step of growing length; by default L / 8.
    """

    name: ClassVar[str] = "dynamic-yarn"
    source: ClassVar[str] = "arXiv 2309.00071 section 3.3"
    facet: ClassVar[Facet] = "frequencies"
    depends_on_length: ClassVar[bool] = True
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    step: int | None = field(default=None, metadata={"length": True})

    def __post_init__(self) -> None:
        _check_betas(self.name, self.beta_fast, self.beta_slow)
        if self.step is not None and self.step < 1:
            raise ConfigError(f"dynamic-yarn: step {self.step} must be at least 1")

    def growing_step(self, rope: RopeSpec) -> int:
        return self.step or super().growing_step(rope)

    def reach(self, rope: RopeSpec) -> float:
        return math.inf

    def frequencies(self, rope: RopeSpec, length: int | None = None) -> Frequencies:
        factor = max(length or 0, rope.trained_length) / rope.trained_length
        inv_freq = _by_parts(rope, factor, self.beta_fast, self.beta_slow, self.truncate)
        return Frequencies(inv_freq, yarn_temperature(factor))


@dataclass(frozen=True, kw_only=True)
class MrRoPE(Factored):
    """MrRoPE: mixed-radix scaling between YaRN's two pairs, lambda from 1 at `low` to s at `high`.

    Pro (the default): lambda_i = s^((i - low)(i + 1 - low) / ((high - low)(high - low + 1))), radices that grow
    pair by pair. Uni: lambda_i = s^((i - low) / (high - low)). m = 0.1 ln s + 1.
    Source: "MrRoPE: Mixed-radix Rotary Position Embedding", 2026.

    Args:
        factor: s, target length over trained length, at least 1.
        uniform: the Uni form instead of Pro.
        beta_fast: turns above which a pair is kept.
        beta_slow: turns below which a pair is slowed by s.
    """

    name: ClassVar[str] = "mrrope"
    source: ClassVar[str] = "MrRoPE, 2026"
    uniform: bool = False
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_betas(self.name, self.beta_fast, self.beta_slow)

    def frequencies(self, rope: RopeSpec, length: int | None = None) -> Frequencies:
        low, high = ramp_ends(rope, self.beta_fast, self.beta_slow, truncate=True)
        width = high - low
        steps = (_pair_indices(rope) - low).clamp(0, width)
        power = steps / width if self.uniform else steps * (steps + 1) / (width * (width + 1))
        return Frequencies(rope.theta / self.factor**power, yarn_temperature(self.factor))


@dataclass(frozen=True, kw_only=True)
class AlphaRoPE(Factored):
    """AlphaRoPE: with d0 = int(d ln(L / 2pi) / ln b), the dims up to d0 (2i <= d0) turn at
    theta_i * s^(-(2i / d0)^a), a = 0.6 ln s, the others at theta_i / s. m = 0.1 ln s + 1.

    d0 is the critical dimension: beyond it no pair completed a turn in training.
    Source: "AlphaRoPE", 2026.
    """

    name: ClassVar[str] = "alpharope"
    source: ClassVar[str] = "AlphaRoPE, 2026"

    def frequencies(self, rope: RopeSpec, length: int | None = None) -> Frequencies:
        d0 = max(int(2 * pair_with_rotations(rope, 1.0)), 1)
        fraction = (2 * _pair_indices(rope) / d0).clamp(max=1)
        power = fraction ** (0.6 * math.log(self.factor))
        return Frequencies(rope.theta / self.factor**power, yarn_temperature(self.factor))


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
