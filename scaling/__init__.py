"""The mathematics of RoPE scaling: facets, methods, the base bound. Imports torch only.

from ropewalk.scaling import YaRN, RopeSpec, parse
YaRN(factor=4).frequencies(RopeSpec(dim=64, base=1e5, trained_length=8192))
"""

from __future__ import annotations

if not __name__.startswith("ropewalk."):
    raise ImportError("import this package as 'ropewalk.scaling'")

from ..plugins import Plugins
from .auto import Auto
from .base import Base, BaseBound, CriticalBase
from .cope import CoPE
from .interpolation import NTK, DynamicNTK, Linear, NTKFixed, NTKMixed
from .lengths import format_length, parse_length
from .llama3 import Llama3
from .longrope import LongRoPE
from .plugin import as_method
from .positions import DualChunk, JetLong, LeakyReRoPE, ReRoPE, SelfExtend, SinkWindow, String
from .resonance import Resonance
from .rope import Composition, Factored, Frequencies, RopeSpec, Scaler, compose
from .temperature import LogN, Temperature
from .yarn import AlphaRoPE, DynamicYaRN, MrRoPE, NTKByParts, YaRN

_BUILT_IN: dict[str, type[Scaler]] = {
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
        ReRoPE,
        LeakyReRoPE,
        SelfExtend,
        DualChunk,
        String,
        JetLong,
        SinkWindow,
        LogN,
        Temperature,
    )
}

METHODS = Plugins(_BUILT_IN, group="ropewalk.scalers", kind="scaler", check=as_method)
"""Every method under its spec name: ours, then those of other packages."""

from .spec import parse  # noqa: E402  (reads METHODS)

__all__ = [
    "METHODS",
    "NTK",
    "AlphaRoPE",
    "Auto",
    "Base",
    "BaseBound",
    "CoPE",
    "Composition",
    "CriticalBase",
    "DualChunk",
    "DynamicNTK",
    "DynamicYaRN",
    "Factored",
    "Frequencies",
    "JetLong",
    "LeakyReRoPE",
    "Linear",
    "Llama3",
    "LogN",
    "LongRoPE",
    "MrRoPE",
    "NTKByParts",
    "NTKFixed",
    "NTKMixed",
    "ReRoPE",
    "Resonance",
    "RopeSpec",
    "Scaler",
    "SelfExtend",
    "SinkWindow",
    "String",
    "Temperature",
    "YaRN",
    "compose",
    "format_length",
    "parse",
    "parse_length",
]
