"""Every method by the name that specs have for it."""

from __future__ import annotations

from ..plugins import Plugins
from .base import Base, BaseBound, CriticalBase
from .cope import CoPE
from .interpolation import NTK, DynamicNTK, Linear, NTKFixed, NTKMixed
from .llama3 import Llama3
from .longrope import LongRoPE
from .plugin import as_method
from .positions import DualChunk, JetLong, LeakyReRoPE, ReRoPE, SelfExtend, SinkWindow, String
from .resonance import Resonance
from .rope import Scaler
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
