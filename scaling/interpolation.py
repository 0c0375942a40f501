"""Position interpolation, the NTK-aware family, CoPE and Resonance.

The NTK-aware methods divide theta_i by lambda_i, which grows from about 1 at the fastest pair to the
factor s at the slowest. Position interpolation divides every theta_i by s. kexue.fm/archives/9706
derives the family from mixed-radix numbers. CoPE slows the slowest pairs. Resonance rounds wavelengths.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from ..errors import ConfigError
from .rope import LARGEST_FACTOR, Facet, Factored, Frequencies, RopeSpec, Scaler


@dataclass(frozen=True, kw_only=True)
class Linear(Factored):
    """Position interpolation (PI): theta_i / s.

    Every angle stays inside the trained range, but neighbours become harder to distinguish. It works best after
    fine-tuning. Source: kaiokendev, SuperHOT, 2023; Chen et al., arXiv 2306.15595.
    """

    name: ClassVar[str] = "linear"
    source: ClassVar[str] = "arXiv 2306.15595"

    def frequencies(self, rope: RopeSpec, length: int | None = None) -> Frequencies:
        return Frequencies(rope.theta / self.factor)


def _stretch_base(rope: RopeSpec, ratio: float) -> Frequencies:
    """The frequencies of the base b * ratio^(d/(d-2)), which divides the slowest pair by exactly `ratio`."""
    i2 = torch.arange(0, rope.dim, 2, dtype=torch.float64)
    return Frequencies(rope.theta * ratio ** (-i2 / (rope.dim - 2)))


def _need_two_pairs(name: str, rope: RopeSpec) -> None:
    if rope.dim < 4:
        raise ConfigError(f"{name}: rotary dimension {rope.dim} has one pair; NTK-aware scaling needs two or more")


@dataclass(frozen=True, kw_only=True)
class NTK(Factored):
    """NTK-aware scaling: the base becomes b * s^(d/(d-2)), so theta_i * s^(-2i/(d-2)).

    The fastest pair does not change, and the slowest is divided by s. In practice the factor must be larger than the
    ratio of the lengths. Source: bloc97, r/LocalLLaMA, June 2023.
    """

    name: ClassVar[str] = "ntk"
    source: ClassVar[str] = "bloc97, 2023; arXiv 2309.00071 section 3.1"

    def check(self, rope: RopeSpec) -> None:
        _need_two_pairs(self.name, rope)

    def frequencies(self, rope: RopeSpec, length: int | None = None) -> Frequencies:
        return _stretch_base(rope, self.factor)


@dataclass(frozen=True, kw_only=True)
class NTKFixed(Factored):
    """NTK-fixed: theta_i / s^(2(i+1)/d).

    Like NTK, but the first pair is scaled too, so that the product of the radices is exactly s.
    Source: Su, kexue.fm/archives/9706.
    """

    name: ClassVar[str] = "ntk-fixed"
    source: ClassVar[str] = "kexue.fm/archives/9706"

    def frequencies(self, rope: RopeSpec, length: int | None = None) -> Frequencies:
        return Frequencies(rope.theta / self.factor ** (rope.exponents + 2 / rope.dim))


@dataclass(frozen=True, kw_only=True)
class NTKMixed(Factored):
    """NTK-mixed: theta_i / exp(a (i+1)^b), a = ln s / (d/2)^b.

    The radices of this mixed-radix number fall from the fast pairs to the slow ones, and their product is s.
    b = 1 is NTKFixed and b = 0 is Linear. The author takes b = 0.625; 0.75 with s = 12 was used for LLaMA-2.
    Source: Su, kexue.fm/archives/9706.

    Args:
        factor: s, target length over trained length, at least 1.
        b: exponent, 0 to 1.
    """

    name: ClassVar[str] = "ntk-mixed"
    source: ClassVar[str] = "kexue.fm/archives/9706"
    b: float = 0.625

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.b <= 1:
            raise ConfigError(f"ntk-mixed: b {self.b:g} must be between 0 (linear) and 1 (ntk-fixed)")

    def frequencies(self, rope: RopeSpec, length: int | None = None) -> Frequencies:
        pairs = torch.arange(1, rope.dim // 2 + 1, dtype=torch.float64)
        a = math.log(self.factor) / (rope.dim / 2) ** self.b
        return Frequencies(rope.theta / torch.exp(a * pairs**self.b))


@dataclass(frozen=True, kw_only=True)
class DynamicNTK(Scaler):
    """Dynamic NTK: beyond L the base becomes b * (s * len / L - (s - 1))^(d/(d-2)); within L nothing changes.

    Factor 1 gives the base of NTK with s = len / L; a larger factor gives a larger base. `len` is the length of the
    sequence itself, not of its batch. Source: emozilla, 2023; the formula is transformers' `dynamic`.

    Args:
        factor: s, at least 1.
        step: tokens after which a growing sequence gets new frequencies; by default L / 8.
    """

    name: ClassVar[str] = "dynamic-ntk"
    source: ClassVar[str] = "emozilla, 2023"
    facet: ClassVar[Facet] = "frequencies"
    depends_on_length: ClassVar[bool] = True
    factor: float = field(default=1.0)
    step: int | None = field(default=None, metadata={"length": True})

    def __post_init__(self) -> None:
        if not 1 <= self.factor <= LARGEST_FACTOR:
            raise ConfigError(f"dynamic-ntk: factor {self.factor:g} must be at least 1 and at most 2^63")
        if self.step is not None and self.step < 1:
            raise ConfigError(f"dynamic-ntk: step {self.step} must be at least 1")

    def growing_step(self, rope: RopeSpec) -> int:
        return self.step or super().growing_step(rope)

    def check(self, rope: RopeSpec) -> None:
        _need_two_pairs(self.name, rope)

    def reach(self, rope: RopeSpec) -> float:
        return math.inf

    def frequencies(self, rope: RopeSpec, length: int | None = None) -> Frequencies:
        beyond = max(length or 0, rope.trained_length) / rope.trained_length - 1
        return _stretch_base(rope, 1 + self.factor * beyond)  # exactly 1 within L, whatever the factor


@dataclass(frozen=True, kw_only=True)
class CoPE(Scaler):
    """Soft-clipped RoPE: the pairs with a wavelength above L, which completed no rotation in training, are
    multiplied by (1 + cos x) / 2, where x runs from 0 to pi over these pairs. The slowest pair stops.

    It does not extend the length, so its reach is the trained length. It is for models that were fine-tuned with
    it. Source: "CoPE: Clipped RoPE as a Scalable Free Lunch for Long Context LLMs", arXiv 2602.05258.
    """

    name: ClassVar[str] = "cope"
    source: ClassVar[str] = "arXiv 2602.05258"
    facet: ClassVar[Facet] = "frequencies"

    def frequencies(self, rope: RopeSpec, length: int | None = None) -> Frequencies:
        theta = rope.theta
        slow = (2 * math.pi > rope.trained_length * theta) & (theta > 0)  # theta 0 has no wavelength
        taper = (1 + torch.cos(torch.linspace(0, math.pi, int(slow.sum()), dtype=torch.float64))) / 2
        theta[slow] *= taper
        return Frequencies(theta)


@dataclass(frozen=True, kw_only=True)
class Resonance(Scaler):
    """Rounds every wavelength 2pi / theta_i to a whole number, so that rotations repeat exactly. It applies to the
    result of any frequency method (`yarn:4|resonance`) and does not change its factor on cos and sin.

    Source: Wang et al., arXiv 2403.00071.
    """

    name: ClassVar[str] = "resonance"
    source: ClassVar[str] = "arXiv 2403.00071"
    facet: ClassVar[Facet] = "wavelength grid"

    def on_grid(self, frequencies: Frequencies) -> Frequencies:
        wavelengths = 2 * math.pi / frequencies.inv_freq
        return Frequencies(2 * math.pi / torch.round(wavelengths).clamp(min=1), frequencies.attention_factor)
