"""Temperatures: a factor on the attention logits of each query."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import ConfigError
from .rope import WIDEST_HEAD, Facet, RopeSpec, Scaler


@dataclass(frozen=True, kw_only=True)
class TemperatureScaler(Scaler):
    """Base class of the temperatures: t(i) in the score, a factor on the logits of query i."""

    facet: ClassVar[Facet] = "temperature"

    @abstractmethod
    def logit_factor(self, positions: Tensor, rope: RopeSpec) -> Tensor:
        """t at 0-based `positions` (int64), float64 of the same shape."""


@dataclass(frozen=True, kw_only=True)
class LogN(TemperatureScaler):
    """log n: the logits of the query at 0-based position p are multiplied by max(1, ln(p + 1) / ln L)^power.

    It keeps the entropy of attention about constant as the text grows. It is for models that were trained without it.
    Source: Su, kexue.fm/archives/8823. Theory gives the power 1 (arXiv 2510.05554), or 1/2 to 2, as the scores of a
    model are distributed (arXiv 2605.12697).

    Args:
        power: the exponent, above 0.
    """

    name: ClassVar[str] = "logn"
    source: ClassVar[str] = "kexue.fm/archives/8823"
    power: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.power <= 100:
            raise ConfigError(f"logn: power {self.power:g} must be above 0 and at most 100")

    def check(self, rope: RopeSpec) -> None:
        _check_logarithm(self.name, rope)

    def logit_factor(self, positions: Tensor, rope: RopeSpec) -> Tensor:
        ratio = torch.log(positions.double() + 1) / math.log(rope.trained_length)
        return ratio.clamp(min=1) ** self.power


@dataclass(frozen=True, kw_only=True)
class InfoScale(TemperatureScaler):
    """InfoScale: the logits of a query on n keys are multiplied by max(1, sqrt((1 - n^(-2/d)) / (1 - L^(-2/d)))).

    It keeps the entropy of attention constant if queries and keys are random directions in d dimensions. For large d
    it is `logn` with the power 1/2. Source: Li et al., arXiv 2501.08570.

    Args:
        dim: d, the dimension of a query, up to 65536; by default that of a head in the config.
    """

    name: ClassVar[str] = "infoscale"
    source: ClassVar[str] = "arXiv 2501.08570"
    dim: int | None = None

    def __post_init__(self) -> None:
        if self.dim is not None and not 1 <= self.dim <= WIDEST_HEAD:
            raise ConfigError(f"infoscale: dim {self.dim!r:.40} must be from 1 to {WIDEST_HEAD}")

    def check(self, rope: RopeSpec) -> None:
        _check_logarithm(self.name, rope)

    def logit_factor(self, positions: Tensor, rope: RopeSpec) -> Tensor:
        power = -2 / (self.dim or rope.dim)
        seen = torch.expm1(power * torch.log(positions.double() + 1))
        return (seen / math.expm1(power * math.log(rope.trained_length))).clamp(min=1).sqrt()


@dataclass(frozen=True, kw_only=True)
class StepLog(TemperatureScaler):
    """Step-log: the logits of the query at 0-based position p are multiplied by 1 + beta ln(1 + floor(p / L0)).

    It grows in steps of L0 tokens. Ministral 3 was trained with it: `llama_4_scaling_beta` in its config.
    Source: Liu et al., Ministral 3, arXiv 2601.08584.

    Args:
        beta: above 0.
        length: L0 in tokens; by default L.
    """

    name: ClassVar[str] = "step-log"
    source: ClassVar[str] = "arXiv 2601.08584"
    beta: float = 0.1
    length: int | None = field(default=None, metadata={"length": True})

    def __post_init__(self) -> None:
        if not 0 < self.beta <= 1e6:
            raise ConfigError(f"step-log: beta {self.beta:g} must be above 0 and at most 1e6")
        if self.length is not None and self.length < 1:
            raise ConfigError(f"step-log: length {self.length} must be at least 1")

    def logit_factor(self, positions: Tensor, rope: RopeSpec) -> Tensor:
        return 1 + self.beta * torch.log1p((positions // (self.length or rope.trained_length)).double())


def _check_logarithm(name: str, rope: RopeSpec) -> None:
    if rope.trained_length < 2:
        raise ConfigError(f"{name}: trained length {rope.trained_length} must be at least 2")


@dataclass(frozen=True, kw_only=True)
class Temperature(TemperatureScaler):
    """A constant factor on the logits. YaRN's is m^2.

    Source: arXiv 2309.00071 section 3.4.

    Args:
        factor: above 0. A factor above 1 sharpens attention.
    """

    name: ClassVar[str] = "temperature"
    source: ClassVar[str] = "arXiv 2309.00071 section 3.4"
    factor: float

    def __post_init__(self) -> None:
        if not 0 < self.factor <= 1e9:
            raise ConfigError(f"temperature: factor {self.factor:g} must be above 0 and at most 1e9")

    def logit_factor(self, positions: Tensor, rope: RopeSpec) -> Tensor:
        return torch.full_like(positions, self.factor, dtype=torch.float64)
