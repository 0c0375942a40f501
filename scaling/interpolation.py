"""Position interpolation, the NTK-aware family, CoPE and Resonance.

The first two divide theta_i by lambda_i with lambda growing from about 1 at the
fastest pair to the factor s at the slowest; Linear is the flat case. kexue.fm/archives/9706 writes
the family as mixed-radix numbers. CoPE slows the slowest pairs, and Resonance rounds wavelengths.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from ..errors import ConfigError
from .rope import Facet, Factored, Frequencies, RopeSpec, Scaler


@dataclass(frozen=True, kw_only=True)
class Linear(Factored):
    """Position interpolation (PI): theta_i / s.

    Keeps every angle inside the trained range, at the price of local resolution; needs fine-tuning to
    shine. Source: kaiokendev, SuperHOT, 2023; Chen et al., arXiv 2306.15595.
    """

    name: ClassVar[str] = "linear"
    source: ClassVar[str] = "arXiv 2306.15595"

    def frequencies(self, rope: RopeSpec, length: int | None = None) -> Frequencies:
        return Frequencies(rope.theta / self.factor)


def _stretch_base(rope: RopeSpec, ratio: float) -> Frequencies:
    """Frequencies of the base b * ratio^(d/(d-2)): the slowest pair is divided by exactly `ratio`."""
    i2 = torch.arange(0, rope.dim, 2, dtype=torch.float64)
    return Frequencies(rope.theta * ratio ** (-i2 / (rope.dim - 2)))


def _need_two_pairs(name: str, rope: RopeSpec) -> None:
    if rope.dim < 4:
        raise ConfigError(f"{name}: rotary dimension {rope.dim} has one pair; NTK-aware scaling needs two or more")


@dataclass(frozen=True, kw_only=True)
class NTK(Factored):
    """NTK-aware scaling: the base becomes b * s^(d/(d-2)), so theta_i * s^(-2i/(d-2)).

    The fastest pair is untouched, the slowest divided by s. In practice the factor must exceed the ratio
    of the lengths. Source: bloc97, r/LocalLLaMA, June 2023.
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

    As NTK, but the first pair is scaled too, so that the radices multiply to exactly s.
    Source: Su, kexue.fm/archives/9706.
    """

    name: ClassVar[str] = "ntk-fixed"
    source: ClassVar[str] = "kexue.fm/archives/9706"

    def frequencies(self, rope: RopeSpec, length: int | None = None) -> Frequencies:
        return Frequencies(rope.theta / self.factor ** (rope.exponents + 2 / rope.dim))


@dataclass(frozen=True, kw_only=True)
class NTKMixed(Factored):
    """NTK-mixed: theta_i / exp(a (i+1)^b), a = ln s / (d/2)^b.

    A mixed-radix number whose radices fall from the fast pairs to the slow ones and multiply to s.
    b = 1 is NTKFixed, b = 0 is Linear; 0.625 is the author's choice, 0.75 with s = 12 was used for LLaMA-2.
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
    """Dynamic NTK: beyond L the base becomes b * (s * len / L - (s - 1))^(d/(d-2)); plain within L.

    Factor 1 follows the length exactly (the base of NTK with s = len / L); a larger one runs ahead of it.
    `len` is the sequence's own, never a neighbour's. Source: emozilla, 2023; the formula is transformers'
    `dynamic`.

    Args:
        factor: s, at least 1.
        step: tokens in a step of growing length; by default L / 8.
    """

    name: ClassVar[str] = "dynamic-ntk"
    source: ClassVar[str] = "emozilla, 2023"
    facet: ClassVar[Facet] = "frequencies"
    depends_on_length: ClassVar[bool] = True
    factor: float = field(default=1.0)
    step: int | None = field(default=None, metadata={"length": True})

    def __post_init__(self) -> None:
        if not 1 <= self.factor <= 2**63:
            raise ConfigError(f"dynamic-ntk: factor {self.factor:g} must be at least 1, and 2^63 at most")
        if self.step is not None and self.step < 1:
            raise ConfigError(f"dynamic-ntk: step {self.step} must be at least 1")

    def growing_step(self, rope: RopeSpec) -> int:
        return self.step or super().growing_step(rope)

    def check(self, rope: RopeSpec) -> None:
        _need_two_pairs(self.name, rope)

    def reach(self, rope: RopeSpec) -> float:
        return math.inf

    def frequencies(self, rope: RopeSpec, length: int | None = None) -> Frequencies:
        stretch = max(length or 0, rope.trained_length) / rope.trained_length
        return _stretch_base(rope, self.factor * stretch - (self.factor - 1))


@dataclass(frozen=True, kw_only=True)
class CoPE(Scaler):
    """Soft-clipped RoPE: the n pairs whose wavelength exceeds L, which never completed a rotation in training,
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


@dataclass(frozen=True, kw_only=True)
class Resonance(Scaler):
    """Rounds every wavelength 2pi / theta_i to an integer, so that rotations repeat exactly; laid over any
    frequency method (`yarn:4|resonance`), whose temperature it keeps.

    Source: Wang et al., arXiv 2403.00071.
    """

    name: ClassVar[str] = "resonance"
    source: ClassVar[str] = "arXiv 2403.00071"
    facet: ClassVar[Facet] = "wavelength grid"

    def on_grid(self, frequencies: Frequencies) -> Frequencies:
        wavelengths = 2 * math.pi / frequencies.inv_freq
        return Frequencies(2 * math.pi / torch.round(wavelengths).clamp(min=1), frequencies.attention_factor)
