"""The mathematics of RoPE scaling: methods by facet, spec strings, and configs. It imports torch only.

from ropewalk.scaling import YaRN, RopeSpec, parse
YaRN(factor=4).frequencies(RopeSpec(dim=64, base=1e5, trained_length=8192))
"""

from __future__ import annotations

if not __name__.startswith("ropewalk."):
    raise ImportError("import this package as 'ropewalk.scaling'")

from .base import Base, BaseBound, CriticalBase
from .by_layer import OnLayers
from .dprope import DPRoPE
from .interpolation import NTK, CoPE, DynamicNTK, Linear, NTKFixed, NTKMixed, Resonance
from .lengths import format_length, parse_length
from .longrope import LongRoPE
from .position_groups import DPE, SelfLogistic
from .positions import DualChunk, JetLong, LeakyReRoPE, ReRoPE, SelfExtend, SinkWindow, String
from .rope import Composition, Factored, Frequencies, RopeSpec, Scaler, compose
from .spec import METHODS, Auto, MethodSummary, MethodTable, parse, scalers
from .temperature import InfoScale, LogN, StepLog, Temperature
from .yarn import AlphaRoPE, DynamicYaRN, Llama3, MrRoPE, NTKByParts, YaRN

__all__ = [
    "DPE",
    "METHODS",
    "NTK",
    "AlphaRoPE",
    "Auto",
    "Base",
    "BaseBound",
    "CoPE",
    "Composition",
    "CriticalBase",
    "DPRoPE",
    "DualChunk",
    "DynamicNTK",
    "DynamicYaRN",
    "Factored",
    "Frequencies",
    "InfoScale",
    "JetLong",
    "LeakyReRoPE",
    "Linear",
    "Llama3",
    "LogN",
    "LongRoPE",
    "MethodSummary",
    "MethodTable",
    "MrRoPE",
    "NTKByParts",
    "NTKFixed",
    "NTKMixed",
    "OnLayers",
    "ReRoPE",
    "Resonance",
    "RopeSpec",
    "Scaler",
    "SelfExtend",
    "SelfLogistic",
    "SinkWindow",
    "StepLog",
    "String",
    "Temperature",
    "YaRN",
    "compose",
    "format_length",
    "parse",
    "parse_length",
    "scalers",
]
