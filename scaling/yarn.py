"""YaRN, Llama 3 and related methods: fast pairs unchanged, slow pairs interpolated, and a ramp between.

Pair i completes L * theta_i / 2pi rotations over the trained length. Pairs with more than `beta_fast`
rotations have seen every angle in training and do not change. Pairs with fewer than `beta_slow` have not
and are divided by s.
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
    """The (real-valued) index of the pair that completes `rotations` rotations over the trained length."""
    return rope.dim * math.log(rope.trained_length / (2 * math.pi * rotations)) / (2 * math.log(rope.base))


def ramp_ends(rope: RopeSpec, beta_fast: float, beta_slow: float, truncate: bool) -> tuple[float, float]:
    """The ends of the ramp as pair indices: the last unchanged pair and the first that is divided by s."""
    low, high = pair_with_rotations(rope, beta_fast), pair_with_rotations(rope, beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = (min(max(end, 0), rope.dim - 1) for end in (low, high))
    return low, high if high != low else high + 0.001


def yarn_temperature(factor: float, mscale: float = 1.0) -> float:
    """0.1 * mscale * ln s + 1, the factor on cos and sin that YaRN's authors fitted for LLaMA; 1 at s = 1."""
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
            f"{name}: beta_fast {beta_fast:g} must be above beta_slow {beta_slow:g}, and both must be within 1e-100 "
            "to 1e100"
        )


@dataclass(frozen=True, kw_only=True)
class NTKByParts(Factored):
    """NTK-by-parts: theta_i (1 - r_i) + theta_i / s * r_i, r_i = clamp((i - low) / (high - low), 0, 1).

    low and high are the pairs with `beta_fast` and `beta_slow` rotations. These are YaRN's frequencies without its
    temperature. The ramp is linear in the index of the pair, as in YaRN's public code and in transformers; section 3.2
    of arXiv 2309.00071 has one that is linear in the rotations. The public code from before the paper is another
    method: it mixes in NTK-aware frequencies at two further thresholds.

    Args:
        factor: s, target length over trained length, at least 1.
        beta_fast: rotations above which a pair does not change.
        beta_slow: rotations below which a pair is divided by s.
        truncate: round the ends of the ramp outwards to whole pairs, as the public code does.
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
        beta_fast: rotations above which a pair does not change.
        beta_slow: rotations below which a pair is divided by s.
        truncate: round the ends of the ramp outwards to whole pairs.
        attention_factor: m itself, in place of the rule.
        mscale: with `mscale_all_dim`, m is the ratio of (0.1 mscale ln s + 1) to (0.1 mscale_all_dim ln s + 1).
        mscale_all_dim: see `mscale`. Alone, or with `attention_factor`, it does not change m. Models with latent
            attention, such as DeepSeek-V3, also multiply all logits by (0.1 mscale_all_dim ln s + 1)^2.
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
            if value is not None and not 0 < value <= 1e9:
                raise ConfigError(f"yarn: {key} {value:g} must be above 0 and at most 1e9")
        if self.mscale is not None and self.mscale_all_dim is None:
            raise ConfigError("yarn: mscale needs mscale_all_dim; give both or neither")
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
    """Dynamic YaRN: YaRN with s = max(1, len / L) in the frequencies and in m; within L nothing changes.

    Source: the `dynamic` variant of jquesnelle/yarn; arXiv 2309.00071 section 3.3.

    Args:
        beta_fast: rotations above which a pair does not change.
        beta_slow: rotations below which a pair is divided by s.
        truncate: round the ends of the ramp outwards to whole pairs.
        step: tokens after which a growing sequence gets new frequencies; by default L / 8.
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
    """MrRoPE: mixed-radix scaling between YaRN's two pairs, with lambda from 1 at `low` to s at `high`.

    Pro (the default): lambda_i = s^((i - low)(i + 1 - low) / ((high - low)(high - low + 1))); the radices grow from
    pair to pair. Uni: lambda_i = s^((i - low) / (high - low)); all are equal. m = 0.1 ln s + 1.
    Source: "MrRoPE: Mixed-radix Rotary Position Embedding", 2026.

    Args:
        factor: s, target length over trained length, at least 1.
        uniform: the Uni form in place of Pro.
        beta_fast: rotations above which a pair does not change.
        beta_slow: rotations below which a pair is divided by s.
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
    """AlphaRoPE: with d0 = int(d ln(L / 2pi) / ln b) and a = 0.6 ln s, the dimensions up to d0 (2i <= d0) get
    theta_i * s^(-(2i / d0)^a), and the others theta_i / s. m = 0.1 ln s + 1.

    d0 is the critical dimension: pairs beyond it completed no rotation in training.
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
    """Llama 3: wavelengths above L / low_freq_factor are multiplied by s, those below L / high_freq_factor do not
    change, and between them theta_i is interpolated linearly in L / wavelength.

    Source: the Llama 3.1 release, 2024 (factor 8, low 1, high 4, L 8192).

    Args:
        factor: s, at least 1.
        low_freq_factor: rotations over L up to which the wavelength of a pair is multiplied by s.
        high_freq_factor: rotations over L from which a pair does not change.
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
        unscaled = ((rotations - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return Frequencies(rope.theta * (1 - (1 - unscaled) * (1 - 1 / self.factor)))
