"""Position maps: the distances at which a query sees its keys, as a short list of bands (`band.Band`)."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import ConfigError
from .band import Band, after, near_and_far, same, zero
from .rope import LARGEST_FACTOR, Facet, RopeSpec, Scaler


@dataclass(frozen=True, kw_only=True)
class PositionScaler(Scaler):
    """Base class of the position maps. For a map, `rope.trained_length` is the reach of the frequencies: L, or the
    reach of the frequency method that the map is composed with."""

    facet: ClassVar[Facet] = "positions"

    @property
    def sink_window(self) -> tuple[int, int] | None:
        """How many first and how many last keys of a text its last query sees; None if it sees all keys.

        Later queries see none of the tokens between, so these can be evicted.
        """
        return None

    @abstractmethod
    def bands(self, rope: RopeSpec, length: int | None = None) -> tuple[Band, ...]:
        """The bands for a sequence that grows to `length` tokens. Only dynamic maps use the length."""

    def _check_below(self, label: str, value: int, rope: RopeSpec) -> None:
        L = rope.trained_length
        if value >= L:
            raise ConfigError(
                f"{self.name}: {label} {value} must be below {L}, the length that the model reaches without it; "
                f"{max(L // 4, 1)} to {max(L // 2, 1)} works best"
            )

    def _check_positive(self, **values: int | None) -> None:
        for label, value in values.items():
            if value is not None and value < 1:
                raise ConfigError(f"{self.name}: {label} {value} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class ReRoPE(PositionScaler):
    """Rectified RoPE: distances of `window` and more all become `window`.

    Bands: distance < w at (i, j); the rest at (w, 0). The length has no limit. w of about L/4 to L/2 works
    best, together with `logn`. Source: Su, kexue.fm/archives/9708.

    Args:
        window: w in tokens, below L.
    """

    name: ClassVar[str] = "rerope"
    source: ClassVar[str] = "kexue.fm/archives/9708"
    window: int = field(metadata={"length": True})

    def __post_init__(self) -> None:
        self._check_positive(window=self.window)

    def check(self, rope: RopeSpec) -> None:
        self._check_below("window", self.window, rope)

    def reach(self, rope: RopeSpec) -> float:
        return math.inf

    def bands(self, rope: RopeSpec, length: int | None = None) -> tuple[Band, ...]:
        def at_window(i: Tensor) -> Tensor:
            return torch.full_like(i, self.window, dtype=torch.float64)

        def at_origin(j: Tensor) -> Tensor:
            return torch.zeros_like(j, dtype=torch.float64)

        return near_and_far(self.window, query=at_window, key=at_origin)


@dataclass(frozen=True, kw_only=True)
class LeakyReRoPE(PositionScaler):
    """Leaky ReRoPE: beyond `window`, distances grow k times slower.

    Bands: distance < w at (i, j); the rest at (w + (i - w) / k, j / k). Reaches w + (L - w) k tokens.
    Source: Su, kexue.fm/archives/9708.

    Args:
        window: w in tokens, below L.
        k: the factor by which distances grow slower, at least 1.
    """

    name: ClassVar[str] = "leaky-rerope"
    source: ClassVar[str] = "kexue.fm/archives/9708"
    window: int = field(metadata={"length": True})
    k: float

    def __post_init__(self) -> None:
        self._check_positive(window=self.window)
        if not 1 <= self.k <= LARGEST_FACTOR:
            raise ConfigError(f"leaky-rerope: k {self.k:g} must be 1 to 2^63; for a larger one use rerope")

    def check(self, rope: RopeSpec) -> None:
        self._check_below("window", self.window, rope)

    def reach(self, rope: RopeSpec) -> float:
        return math.ceil(self.window + (rope.trained_length - self.window) * self.k)

    def bands(self, rope: RopeSpec, length: int | None = None) -> tuple[Band, ...]:
        w, k = self.window, self.k

        def query(i: Tensor) -> Tensor:
            return w + (i.double() - w) / k

        def key(j: Tensor) -> Tensor:
            return j.double() / k

        return near_and_far(w, query, key)


@dataclass(frozen=True, kw_only=True)
class SelfExtend(PositionScaler):
    """Self-Extend: far keys share a position in groups of `group`.

    Bands: distance < W at (i, j); the rest at (i // G + W - W // G, j // G). Reaches (L - W + W // G) G tokens, which
    is the paper's (L - W) G + W where G divides W. Source: Jin et al., arXiv 2401.01325.

    Args:
        group: G, the number of tokens that share a position.
        window: W in tokens, below L.
    """

    name: ClassVar[str] = "self-extend"
    source: ClassVar[str] = "arXiv 2401.01325"
    group: int
    window: int = field(metadata={"length": True})

    def __post_init__(self) -> None:
        self._check_positive(group=self.group, window=self.window)

    def check(self, rope: RopeSpec) -> None:
        self._check_below("window", self.window, rope)

    def reach(self, rope: RopeSpec) -> float:
        return (rope.trained_length - self.window + self.window // self.group) * self.group

    def bands(self, rope: RopeSpec, length: int | None = None) -> tuple[Band, ...]:
        G, W = self.group, self.window

        def query(i: Tensor) -> Tensor:
            return (i // G + W - W // G).double()

        def key(j: Tensor) -> Tensor:
            return (j // G).double()

        return near_and_far(W, query, key)


@dataclass(frozen=True, kw_only=True)
class DualChunk(PositionScaler):
    """Dual chunk attention: positions are counted inside chunks of t = chunk - window tokens.

    Bands: the same chunk at (i mod t, j mod t); the chunk before at (min(i mod t + t, c), j mod t), so that the nearest
    `window` keys keep their distance; older chunks at (c, j mod t). The length has no limit. The paper's
    temperature, m = 0.05 ln s + 1, is `temperature` with factor m^2. Source: An et al., arXiv 2402.17463, with the
    paper's last constant c; its public code has 2 t - 1.

    Args:
        chunk: c in tokens, below L; by default 3 L / 4.
        window: w in tokens, at most c / 2; by default L / 8.
    """

    name: ClassVar[str] = "dual-chunk"
    source: ClassVar[str] = "arXiv 2402.17463"
    chunk: int | None = field(default=None, metadata={"length": True})
    window: int | None = field(default=None, metadata={"length": True})

    def __post_init__(self) -> None:
        self._check_positive(chunk=self.chunk, window=self.window)

    def sizes(self, rope: RopeSpec) -> tuple[int, int]:
        """(c, w) on this geometry."""
        L = rope.trained_length
        return self.chunk or 3 * L // 4, self.window or L // 8

    def check(self, rope: RopeSpec) -> None:
        c, w = self.sizes(rope)
        L = rope.trained_length
        if not (0 < 2 * w <= c < L):
            raise ConfigError(
                f"dual-chunk: chunk {c} and window {w} must satisfy 2 window <= chunk < {L}, the length that the model "
                f"reaches without it; its authors take {3 * L // 4} and {L // 8}"
            )

    def reach(self, rope: RopeSpec) -> float:
        return math.inf

    def bands(self, rope: RopeSpec, length: int | None = None) -> tuple[Band, ...]:
        c, w = self.sizes(rope)
        t = c - w

        def chunk_start(i: Tensor) -> Tensor:
            return i // t * t

        def chunk_before(i: Tensor) -> Tensor:
            return (i // t * t - t).clamp(min=0)

        def inside(x: Tensor) -> Tensor:
            return (x % t).double()

        def from_before(i: Tensor) -> Tensor:
            return (inside(i) + t).clamp(max=c)

        def from_older(i: Tensor) -> Tensor:
            return torch.full_like(i, c, dtype=torch.float64)

        return (
            Band(name="same chunk", start=chunk_start, stop=after, query=inside, key=inside),
            Band(name="chunk before", start=chunk_before, stop=chunk_start, query=from_before, key=inside),
            Band(name="older", start=zero, stop=chunk_before, query=from_older, key=inside),
        )


@dataclass(frozen=True, kw_only=True)
class String(PositionScaler):
    """STRING: far distances are reduced to nearer ones, which are more frequent in training.

    Bands: distance < S at (i, j); the rest at (i - S + W, j), S - W nearer. It is for contexts within L.
    Source: An et al., arXiv 2410.18745.

    Args:
        shift: S in tokens; by default L / 3.
        window: W in tokens, the new distance of the nearest shifted key.
    """

    name: ClassVar[str] = "string"
    source: ClassVar[str] = "arXiv 2410.18745"
    shift: int | None = field(default=None, metadata={"length": True})
    window: int = field(default=128, metadata={"length": True})

    def __post_init__(self) -> None:
        self._check_positive(shift=self.shift, window=self.window)

    def size(self, rope: RopeSpec) -> int:
        """S on this geometry."""
        return self.shift or rope.trained_length // 3

    def check(self, rope: RopeSpec) -> None:
        S = self.size(rope)
        self._check_below("shift", S, rope)
        if self.window > S:
            raise ConfigError(
                f"string: window {self.window} must not exceed the shift {S}; its authors take L/3 and 128"
            )

    def reach(self, rope: RopeSpec) -> float:
        return rope.trained_length + self.size(rope) - self.window

    def bands(self, rope: RopeSpec, length: int | None = None) -> tuple[Band, ...]:
        S, W = self.size(rope), self.window

        def shifted(i: Tensor) -> Tensor:
            return (i - S + W).double()

        return near_and_far(S, shifted, same)


@dataclass(frozen=True, kw_only=True)
class JetLong(PositionScaler):
    """Jet-Long: far keys share a position in groups of G = ceil(len / L), the smallest group that the length needs.

    Bands: distance < near at (i, j); the rest at (i // G, j // G). `len` is the length of the sequence itself, not of
    its batch. Source: NVIDIA, Jet-Long, 2026.

    Args:
        near: the number of nearest tokens that keep their distance, below L.
        step: tokens after which a growing sequence gets new positions; by default L / 8.
    """

    name: ClassVar[str] = "jet-long"
    source: ClassVar[str] = "NVIDIA, Jet-Long, 2026"
    depends_on_length: ClassVar[bool] = True
    near: int = field(default=2048, metadata={"length": True})
    step: int | None = field(default=None, metadata={"length": True})

    def __post_init__(self) -> None:
        self._check_positive(near=self.near, step=self.step)

    def check(self, rope: RopeSpec) -> None:
        self._check_below("near", self.near, rope)

    def reach(self, rope: RopeSpec) -> float:
        return math.inf

    def growing_step(self, rope: RopeSpec) -> int:
        return self.step or super().growing_step(rope)

    def bands(self, rope: RopeSpec, length: int | None = None) -> tuple[Band, ...]:
        G = max(1, math.ceil((length or 0) / rope.trained_length))

        def grouped(x: Tensor) -> Tensor:
            return (x // G).double()

        return near_and_far(self.near, grouped, grouped)


@dataclass(frozen=True, kw_only=True)
class SinkWindow(PositionScaler):
    """Attention sinks: the first `sinks` keys and the last `window`, with positions counted among these keys.

    The keys between are evicted. The model does not read more at once, but a stream can go on without end.
    Source: Xiao et al., arXiv 2309.17453.

    Args:
        window: the number of last keys, including the query's own; sinks + window is at most L.
        sinks: the number of first keys, which every query sees.
    """

    name: ClassVar[str] = "sink-window"
    source: ClassVar[str] = "arXiv 2309.17453"
    window: int = field(metadata={"length": True})
    sinks: int = 4

    def __post_init__(self) -> None:
        self._check_positive(window=self.window, sinks=self.sinks)

    def check(self, rope: RopeSpec) -> None:
        if self.sinks + self.window > rope.trained_length:
            raise ConfigError(
                f"sink-window: {self.sinks} sinks and window {self.window} exceed the trained length "
                f"{rope.trained_length}; take fewer, for example 4 sinks and a window of half that length"
            )

    def reach(self, rope: RopeSpec) -> float:
        return math.inf

    @property
    def sink_window(self) -> tuple[int, int]:
        return self.sinks, self.window

    def bands(self, rope: RopeSpec, length: int | None = None) -> tuple[Band, ...]:
        s, w = self.sinks, self.window

        def border(i: Tensor) -> Tensor:
            return (i - w + 1).clamp(min=0)

        def sinks_stop(i: Tensor) -> Tensor:
            return border(i).clamp(max=s)

        def in_cache(i: Tensor) -> Tensor:
            return i.clamp(max=s + w - 1).double()

        return (
            Band(name="window", start=border, stop=after, query=same, key=same),
            Band(name="sinks", start=zero, stop=sinks_stop, query=in_cache, key=same),
        )
