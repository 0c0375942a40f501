"""The mathematics of RoPE scaling: facets, methods, the base bound. Imports torch only.

from ropewalk.scaling import YaRN, RopeSpec, parse
YaRN(factor=4).frequencies(RopeSpec(dim=64, base=1e5, trained_length=8192))
"""

from __future__ import annotations

if not __name__.startswith("ropewalk."):
    raise ImportError("import this package as 'ropewalk.scaling'")

from .base import Base, BaseBound, CriticalBase
from .cope import CoPE
from .interpolation import NTK, DynamicNTK, Linear, NTKFixed, NTKMixed
from .lengths import format_length, parse_length
from .llama3 import Llama3
from .longrope import LongRoPE
from .resonance import Resonance
from .rope import Composition, Frequencies, RopeSpec, Scaler, compose
from .yarn import AlphaRoPE, DynamicYaRN, MrRoPE, NTKByParts, YaRN

METHODS: dict[str, type[Scaler]] = {
    method.name: method
    for method in (
        Scaler,
        Linear,
        NTK,
        NTKFixed,
        NTKMixed,
        DynamicNTK,
        NTKByParts,
        YaRN,
        DynamicYaRN,
        Llama3,
        LongRoPE,
        Base,
        CriticalBase,
        BaseBound,
        MrRoPE,
        AlphaRoPE,
        Resonance,
        CoPE,
    )
}
"""Every method under its spec name."""

from .spec import parse  # noqa: E402  (reads METHODS)

__all__ = [
    "METHODS",
    "NTK",
    "AlphaRoPE",
    "Base",
    "BaseBound",
    "CoPE",
    "Composition",
    "CriticalBase",
    "DynamicNTK",
    "DynamicYaRN",
    "Frequencies",
    "Linear",
    "Llama3",
    "LongRoPE",
    "MrRoPE",
    "NTKByParts",
    "NTKFixed",
    "NTKMixed",
    "Resonance",
    "RopeSpec",
    "Scaler",
    "YaRN",
    "compose",
    "format_length",
    "parse",
    "parse_length",
]
