"""The RoPE of a GGUF file: its keys, written from a scaler and read as llama.cpp reads them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from . import hf_write
from .configured_rope import ConfiguredRope
from .interpolation import Linear
from .longrope import LongRoPE
from .rope import LARGEST_FACTOR, RopeSpec, Scaler
from .yarn import Llama3, YaRN

__all__ = ["GgufRope"]

_LLAMA3_LENGTH = 8192
"""The trained length of Llama 3. A file with its divisors does not state it."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class GgufRope:
    """The rotary part of a GGUF file.

    Args:
        dim: `rope.dimension_count`.
        base: `rope.freq_base`.
        scaling: the values of `rope.scaling.*`, by the rest of the key.
        divisors: `rope_freqs.weight`, float32 [d/2], which divides each frequency; None if the file has none.
    """

    dim: int
    base: float
    scaling: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    divisors: Tensor | None = None

    @classmethod
    def of(cls, rope: RopeSpec, scaler: Scaler) -> GgufRope:
        """The simplest form in which llama.cpp computes `scaler.frequencies(rope)`.

        A base, linear interpolation and plain YaRN have their own keys. Every other static method is a divisor for
        each pair, and a factor on cos and sin.

        Raises:
            ConfigError: the scaler depends on the length, or sets more than the frequencies.
        """
        if scaler.depends_on_length:
            raise ConfigError(f"{scaler} depends on the length of the text, and a GGUF file has one set of frequencies")
        written = hf_write.write(rope, scaler)
        base = float(written["rope_theta"])
        scaling: dict[str, Any] | None = None
        match written["rope_type"]:
            case "default":
                scaling = {}
            case "linear":
                scaling = {"type": "linear", "factor": float(written["factor"])}
            case "yarn" if isinstance(scaler, YaRN) and scaler == YaRN(factor=scaler.factor):
                trained = {"original_context_length": rope.trained_length}
                scaling = {"type": "yarn", "factor": scaler.factor, **trained}
        if scaling is not None:
            return cls(dim=rope.dim, base=base, scaling=scaling)
        frequencies = scaler.frequencies(rope)
        scaling = {"original_context_length": rope.trained_length}
        if frequencies.attention_factor != 1:
            scaling["attn_factor"] = frequencies.attention_factor
        divisors = hf_write.divisors(rope, frequencies).float()
        return cls(dim=rope.dim, base=rope.base, scaling=scaling, divisors=divisors)

    def configured(self, context_length: int) -> ConfiguredRope:
        """The geometry and the scaler of a file with this `context_length`.

        The divisors of Llama 3.1 become `Llama3`, others become `LongRoPE` factors.

        Raises:
            ConfigError: the number of divisors is not that of the pairs, or the file has another scaling besides them.
        """
        trained = int(self.scaling.get("original_context_length", context_length))
        rope = RopeSpec(dim=self.dim, base=self.base, trained_length=trained)
        scaler: Scaler = Scaler()
        if self.divisors is not None or "attn_factor" in self.scaling:
            rope, scaler = self._divided(rope, context_length)
        elif self.kind == "linear":
            scaler = Linear(factor=self.factor)
        elif self.kind == "yarn":
            scaler = YaRN(factor=self.factor)
        scaler.check(rope)
        declared = max(context_length, trained)
        if "original_context_length" in self.scaling or self.kind == "yarn" or isinstance(scaler, Llama3):
            return ConfiguredRope.of(rope, scaler, declared)
        return ConfiguredRope(rope=rope, scaler=scaler, max_length=declared)

    def _divided(self, rope: RopeSpec, context_length: int) -> tuple[RopeSpec, Scaler]:
        if self.kind != "none":
            raise ConfigError(f"rotary scaling of type {self.kind!r} with divisors or attn_factor is not supported")
        divisors = torch.ones(self.dim // 2) if self.divisors is None else self.divisors
        m = float(self.scaling.get("attn_factor", 1.0))
        llama = dataclasses.replace(rope, trained_length=_LLAMA3_LENGTH)
        largest = min(max(float(divisors.max()), 1.0), LARGEST_FACTOR)  # CoPE's divisors are far above it
        released = Llama3(factor=largest)
        expected = llama.theta / released.frequencies(llama).inv_freq
        is_llama = expected.shape == divisors.shape and torch.allclose(expected, divisors.double(), rtol=1e-4, atol=0)
        if m == 1 and is_llama:
            return llama, released
        factors = tuple(divisors.double().tolist())
        factor = max(context_length / rope.trained_length, 1.0)
        return rope, LongRoPE(factor=factor, short=factors, long=factors, attention_factor=m)

    @property
    def kind(self) -> str:
        """`rope.scaling.type`."""
        return str(self.scaling.get("type", "none"))

    @property
    def factor(self) -> float:
        """`rope.scaling.factor`."""
        return float(self.scaling.get("factor", 0.0)) or 1.0  # llama.cpp takes 0 for none
