"""The rotary geometry of a model, and the base class of scalers.

The score of query i on key j in a RoPE model is

    s(i, j) = t(i) * <R(w * Pq(i)) q_i, R(w * Pk(j)) k_j> / sqrt(d)

A context-extension method changes the frequencies `w` (with one factor on cos and sin), the position
maps `Pq, Pk`, or the temperature `t`. A `Scaler` is a frozen value that sets one of these facets.
Scalers of different facets compose with `|`, and so do scalers of one facet for different layers (`by_layer.py`).
"""

from __future__ import annotations

import dataclasses
import math
import sys
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor

from ..errors import ConfigError
from .band import PLAIN, Band
from .lengths import format_length

Facet = Literal["frequencies", "wavelength grid", "positions", "temperature"]

ALL_LAYERS = (range(sys.maxsize),)

LARGEST_FACTOR = 2**63
"""The largest factor on a length. Positions are int64, so a larger one changes nothing, and numbers may overflow."""

WIDEST_HEAD = 2**16
"""The largest dimension of a head."""

_LONGEST = 2**62  # tokens; position maps add to positions, which are int64


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """The rotary geometry of a model: all numbers that a method computes from.

    Args:
        dim: rotary dimension d, even; d/2 pairs are rotated.
        base: rotary base b.
        trained_length: L, the number of positions that the plain frequencies were trained on.
        rotating_pairs: how many of the d/2 pairs rotate; the slowest pairs do not (transformers' `proportional`
            type). None means all.
    """

    dim: int
    base: float
    trained_length: int
    rotating_pairs: int | None = None

    def __post_init__(self) -> None:
        if self.dim < 2 or self.dim % 2:
            raise ConfigError(f"rotary dimension {self.dim} must be even and at least 2")
        if not (math.isfinite(self.base) and self.base > 1):
            raise ConfigError(f"rotary base {self.base} must be above 1")
        if self.trained_length < 1:
            raise ConfigError(f"trained length {self.trained_length} must be at least 1")
        if self.rotating_pairs is not None and not 0 <= self.rotating_pairs <= self.dim // 2:
            raise ConfigError(f"rotating_pairs {self.rotating_pairs} must be in 0..{self.dim // 2}")

    @property
    def exponents(self) -> Tensor:
        """2i/d for every pair i, float64 [d/2]."""
        return torch.arange(0, self.dim, 2, dtype=torch.float64) / self.dim

    @property
    def theta(self) -> Tensor:
        """Plain frequencies b^(-2i/d) in radians per position, float64 [d/2].

        They are computed in float32 by the same operations as in transformers, so they are the numbers that the
        model was trained with. A scaler with factor 1 therefore leaves the model unchanged, bit for bit.
        """
        exponents = torch.arange(0, self.dim, 2, dtype=torch.float32) / self.dim
        theta = (1.0 / (self.base**exponents)).double()
        if self.rotating_pairs is not None:
            theta[self.rotating_pairs :] = 0.0
        return theta


class Frequencies(NamedTuple):
    """The input of the rotary module: `inv_freq` (float64 [d/2], radians per position) and a factor on cos and sin,
    whose square multiplies the attention logits."""

    inv_freq: Tensor
    attention_factor: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scaler:
    """Base class of every method; itself the untouched model, written `none`.

    A subclass is a frozen keyword-only dataclass that checks its fields when it is made and overrides the methods
    of its facet."""

    name: ClassVar[str] = "none"
    source: ClassVar[str] = "the model as it was trained"
    facet: ClassVar[Facet | None] = None
    depends_on_length: ClassVar[bool] = False

    def frequencies(self, rope: RopeSpec, length: int | None = None) -> Frequencies:
        """The frequencies for a sequence that grows to `length` tokens. Only dynamic methods use the length."""
        return self.on_grid(Frequencies(rope.theta))

    def on_grid(self, frequencies: Frequencies) -> Frequencies:
        """The `frequencies` of another method, rounded to the wavelength grid of this one."""
        return frequencies

    def bands(self, rope: RopeSpec, length: int | None = None) -> tuple[Band, ...]:
        """The bands of keys for a sequence that grows to `length` tokens."""
        return (PLAIN,)

    def logit_factor(self, positions: Tensor, rope: RopeSpec) -> Tensor:
        """The temperature t(i) of the queries at the 0-based `positions` (int64), float64 of the same shape."""
        return torch.ones_like(positions, dtype=torch.float64)

    def reach(self, rope: RopeSpec) -> float:
        """The number of tokens that the method is made for; `inf` if it has no limit."""
        return rope.trained_length

    def check(self, rope: RopeSpec) -> None:
        """Raise ConfigError if the method does not work on this geometry."""

    def growing_step(self, rope: RopeSpec) -> int:
        """The tokens by which a sequence grows before a method that depends on the length is computed again."""
        return max(1, rope.trained_length // 8)

    def growing_length(self, position: int, rope: RopeSpec) -> int:
        """The length for the query at 0-based `position`: L, or beyond it L and a whole number of steps."""
        L, step = rope.trained_length, self.growing_step(rope)
        return L + max(0, math.ceil((position + 1 - L) / step)) * step

    @property
    def parts(self) -> tuple[Scaler, ...]:
        """The scalers that are composed here, in order. `none` has no parts."""
        return () if type(self) is Scaler else (self,)

    @property
    def changed_layers(self) -> tuple[range, ...]:
        """The layers that it changes, counted from 0."""
        return ALL_LAYERS

    @property
    def differs_by_layer(self) -> bool:
        """True if it is not the same for all layers. Then only `on` gives a scaler that can be computed."""
        return False

    def on(self, layer: int) -> Scaler:
        """The scaler of the layer with this index."""
        return self

    def member(self, facet: Facet) -> Scaler | None:
        """The part that sets `facet`, or None. If the layers differ, it is the first of such parts."""
        return next((part for part in self.parts if part.facet == facet), None)

    def rope_for_positions(self, rope: RopeSpec) -> RopeSpec:
        """`rope` for the position map: its trained length is the reach of the frequency method."""
        frequencies = self.member("frequencies")
        reach = frequencies.reach(rope) if frequencies else math.inf
        return dataclasses.replace(rope, trained_length=int(min(reach, _LONGEST))) if math.isfinite(reach) else rope

    def __or__(self, other: Scaler) -> Scaler:
        return compose(*self.parts, *other.parts)

    def __str__(self) -> str:
        return format_spec(self.name, self)

    @property
    def brief(self) -> str:
        """The spec in one line, without long lists of numbers."""
        return str(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Composition(Scaler):
    """Scalers of different facets together. The operator `|` makes one."""

    members: tuple[Scaler, ...]

    def __post_init__(self) -> None:
        for index, member in enumerate(self.members):
            if member.facet is None:
                raise ConfigError(
                    f"{member.name!r} is a whole scaler and cannot be joined with others by '|'; use it alone"
                )
            for other in self.members[:index]:
                if other.facet == member.facet and (layer := _shared_layer(other, member)) is not None:
                    by_layer = other.differs_by_layer or member.differs_by_layer
                    where = f" of layer {layer}" if by_layer else ""
                    raise ConfigError(
                        f"{other.name!r} and {member.name!r} both set the {member.facet}{where}; keep one of them"
                    )

    def __str__(self) -> str:
        return "|".join(map(str, self.members))

    @property
    def depends_on_length(self) -> bool:  # type: ignore[override]
        return any(m.depends_on_length for m in self.members)

    @property
    def parts(self) -> tuple[Scaler, ...]:
        return self.members

    @property
    def differs_by_layer(self) -> bool:
        return any(m.differs_by_layer for m in self.members)

    def on(self, layer: int) -> Scaler:
        if not self.differs_by_layer:
            return self
        return compose(*(part for m in self.members for part in m.on(layer).parts))

    def frequencies(self, rope: RopeSpec, length: int | None = None) -> Frequencies:
        method, grid = self.member("frequencies") or Scaler(), self.member("wavelength grid") or Scaler()
        return grid.on_grid(method.frequencies(rope, length))

    def bands(self, rope: RopeSpec, length: int | None = None) -> tuple[Band, ...]:
        positions = self.member("positions") or Scaler()
        return positions.bands(self.rope_for_positions(rope), length)

    def logit_factor(self, positions: Tensor, rope: RopeSpec) -> Tensor:
        return (self.member("temperature") or Scaler()).logit_factor(positions, rope)

    def reach(self, rope: RopeSpec) -> float:
        frequencies, positions = self.member("frequencies"), self.member("positions")
        if frequencies and math.isinf(frequencies.reach(rope)):
            return math.inf
        return (positions or Scaler()).reach(self.rope_for_positions(rope))

    def check(self, rope: RopeSpec) -> None:
        for member in self.members:
            member.check(self.rope_for_positions(rope) if member.facet == "positions" else rope)

    def growing_step(self, rope: RopeSpec) -> int:
        return min((m.growing_step(rope) for m in self.members if m.depends_on_length), default=rope.trained_length)


def compose(*scalers: Scaler) -> Scaler:
    """One scaler from several of different facets. Raises ConfigError if two set the same facet."""
    if not scalers:
        return Scaler()
    return scalers[0] if len(scalers) == 1 else Composition(members=tuple(scalers))


def _shared_layer(one: Scaler, other: Scaler) -> int | None:
    """The first layer that both scalers change, or None."""
    pairs = [(a, b) for a in one.changed_layers for b in other.changed_layers]
    return min((max(a.start, b.start) for a, b in pairs if max(a.start, b.start) < min(a.stop, b.stop)), default=None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Factored(Scaler):
    """Base class of the frequency methods with a factor s = N / L >= 1."""

    facet: ClassVar[Facet] = "frequencies"
    factor: float

    def __post_init__(self) -> None:
        if not 1 <= self.factor <= LARGEST_FACTOR:
            raise ConfigError(
                f"{self.name}: factor {self.factor:g} must be at least 1 (target length / trained length) and at most "
                "2^63"
            )

    def reach(self, rope: RopeSpec) -> float:
        return self.factor * rope.trained_length

    def with_factor(self, factor: float) -> Self:
        """The same method with another factor."""
        return dataclasses.replace(self, factor=factor)


if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def format_spec(name: str, scaler: DataclassInstance) -> str:
    """The spec string of one method with the fields of `scaler`, without those that have their default."""
    values = []
    for position, field in enumerate(dataclasses.fields(scaler)):
        value = getattr(scaler, field.name)
        if value == field.default:
            continue
        text = _format_value(value, is_length=field.metadata.get("length", False))
        values.append(text if position == 0 else f"{field.name}={text}")
    return name + (":" + ",".join(values) if values else "")


def _format_value(value: Any, *, is_length: bool) -> str:
    if is_length:
        return format_length(value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "/".join(_format_value(v, is_length=False) for v in value)
    if isinstance(value, float) and value == int(value) and abs(value) < 1e15:
        return str(int(value))
    return repr(value)
