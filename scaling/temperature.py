"""Temperatures: a factor on the attention logits of each query."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import ConfigError
from .rope import Facet, RopeSpec, Scaler


@dataclass(frozen=True, kw_only=True)
class TemperatureScaler(Scaler):
    """Base class of the temperatures: t(i) in the score, a factor on the logits of query i."""

    facet: ClassVar[Facet] = "temperature"

    @abstractmethod
    def logit_factor(self, positions: Tensor, rope: RopeSpec) -> Tensor:
        """t at 0-based `positions` (int64), float64 of the same shape."""


@dataclass(frozen=True, kw_only=True)
class LogN(TemperatureScaler):
    """log n: the logits of the query at 0-based position p are multiplied by max(1, ln(p + 1) / ln L).

    It keeps the entropy of attention about constant as the text grows. It is for models that were trained without it.
    Source: Su, kexue.fm/archives/8823.
    """

    name: ClassVar[str] = "logn"
    source: ClassVar[str] = "kexue.fm/archives/8823"

    def check(self, rope: RopeSpec) -> None:
        if rope.trained_length < 2:
            raise ConfigError(f"logn: trained length {rope.trained_length} must be at least 2")

    def logit_factor(self, positions: Tensor, rope: RopeSpec) -> Tensor:
        return (torch.log(positions.double() + 1) / math.log(rope.trained_length)).clamp(min=1)


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
        if not (math.isfinite(self.factor) and self.factor > 0):
            raise ConfigError(f"temperature: factor {self.factor:g} must be above 0")

    def logit_factor(self, positions: Tensor, rope: RopeSpec) -> Tensor:
        return torch.full_like(positions, self.factor, dtype=torch.float64)
