"""Scalers for some layers of a model: `yarn:2@0-9|yarn:4@10-`."""

from __future__ import annotations

import itertools
import re
import sys
from dataclasses import dataclass
from typing import NoReturn

from torch import Tensor

from ..errors import ConfigError
from .band import Band
from .rope import ALL_LAYERS, Facet, Frequencies, RopeSpec, Scaler

_LAYERS = re.compile(r"(\d{1,5})(?:(-)(\d{1,5})?)?", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class OnLayers(Scaler):
    """A scaler for some layers. The others are as they would be without it.

    Layers are counted from 0. A spec has them after `@`: one (`yarn:4@12`), a range (`yarn:4@0-9`), all from one on
    (`yarn:4@10-`), or several of these, joined by `/`. Each method has its own: in `yarn:4|logn@10-` only `logn` is for
    some layers. Methods of the same facet can be joined if no layer has two of them. The reach is the smallest of all
    layers, and a layer without a method for its frequencies reaches L. Found by search, factors for each layer are a
    method of their own: Wu et al., LPES, arXiv 2503.04355.

    Args:
        scaler: one method.
        layers: ranges of indices of layers, increasing, not touching one another, and not all layers.
    """

    scaler: Scaler
    layers: tuple[range, ...]

    def __post_init__(self) -> None:
        if self.scaler.facet is None or self.scaler.differs_by_layer:
            raise ConfigError(
                f"{self.scaler} cannot be for some layers; only single methods can, as in 'yarn:4@0-9|logn@0-9'"
            )
        if not self.layers or any(part.step != 1 or not part or part.start < 0 for part in self.layers):
            raise ConfigError(f"layers {self.layers} must be ranges of indices, such as (range(0, 10),)")
        for before, after in itertools.pairwise(self.layers):
            if after.start <= before.stop:
                raise ConfigError(f"layers {format_layers(self.layers)} must increase, with a gap between their ranges")
        if self.layers == ALL_LAYERS:
            raise ConfigError(f"these are all layers; use {self.scaler} itself")

    @property
    def name(self) -> str:  # type: ignore[override]
        return str(self)

    @property
    def source(self) -> str:  # type: ignore[override]
        return self.scaler.source

    @property
    def facet(self) -> Facet | None:  # type: ignore[override]
        return self.scaler.facet

    @property
    def depends_on_length(self) -> bool:  # type: ignore[override]
        return self.scaler.depends_on_length

    @property
    def changed_layers(self) -> tuple[range, ...]:
        return self.layers

    @property
    def differs_by_layer(self) -> bool:
        return True

    def on(self, layer: int) -> Scaler:
        return self.scaler if any(layer in part for part in self.layers) else Scaler()

    def frequencies(self, rope: RopeSpec, length: int | None = None) -> Frequencies:
        self._refuse()

    def on_grid(self, frequencies: Frequencies) -> Frequencies:
        self._refuse()

    def bands(self, rope: RopeSpec, length: int | None = None) -> tuple[Band, ...]:
        self._refuse()

    def logit_factor(self, positions: Tensor, rope: RopeSpec) -> Tensor:
        self._refuse()

    def reach(self, rope: RopeSpec) -> float:
        self._refuse()

    def check(self, rope: RopeSpec) -> None:
        self._refuse()

    def growing_step(self, rope: RopeSpec) -> int:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise ConfigError(
            f"{self} is for some layers only, and here all layers have the same scaler; use {self.scaler}"
        )

    def __str__(self) -> str:
        return f"{self.scaler}@{format_layers(self.layers)}"

    @property
    def brief(self) -> str:
        return f"{self.scaler.brief}@{format_layers(self.layers)}"


def parse_layers(text: str) -> tuple[range, ...]:
    """The layers in a spec.

    >>> parse_layers("0-4/20-")
    (range(0, 5), range(20, 9223372036854775807))

    Raises:
        ConfigError: they are written wrongly, or do not increase.
    """
    parts: list[range] = []
    for item in text.split("/"):
        match = _LAYERS.fullmatch(item.strip())
        if match is None:
            raise ConfigError(f"{text!r} are no layers; write 12, 0-9, 10- (all from 10 on) or 0-4/20-24")
        first = int(match[1])
        last = int(match[3]) if match[3] else sys.maxsize - 1 if match[2] else first
        if last < first or (parts and first < parts[-1].stop):
            raise ConfigError(f"layers {text!r} must increase")
        if parts and first == parts[-1].stop:
            first = parts.pop().start
        parts.append(range(first, last + 1))
    return tuple(parts)


def format_layers(layers: tuple[range, ...]) -> str:
    """Layers as a spec has them.

    >>> format_layers((range(0, 5), range(7, 8)))
    '0-4/7'
    """
    return "/".join(map(_format_range, layers))


def _format_range(part: range) -> str:
    if part.stop == sys.maxsize:
        return f"{part.start}-"
    return str(part.start) if len(part) == 1 else f"{part.start}-{part.stop - 1}"


def layer_groups(scaler: Scaler, count: int = sys.maxsize) -> dict[Scaler, tuple[range, ...]]:
    """The different scalers of the first `count` layers, each with its layers."""
    parts = [part for member in scaler.parts for part in member.changed_layers]
    inside = {border for part in parts for border in (part.start, part.stop) if border < count}
    borders = sorted({0, count} | inside)
    groups: dict[Scaler, list[range]] = {}
    for start, stop in itertools.pairwise(borders):
        layers = groups.setdefault(scaler.on(start), [])
        if layers and layers[-1].stop == start:
            start = layers.pop().start
        layers.append(range(start, stop))
    return {part: tuple(layers) for part, layers in groups.items()}
