"""`auto`: the scaler left to the length of each request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NoReturn

from torch import Tensor

from ..errors import ConfigError
from .band import Band
from .rope import Frequencies, RopeSpec, Scaler


@dataclass(frozen=True, kw_only=True)
class Auto(Scaler):
    """The length of every request (prompt and `max_new_tokens`, or the tokens scored) decides, each on its own.

    Up to the trained length L it is the untouched model, to the bit. Beyond, it is what `ropewalk tune` has found for
    this model: of the results kept in the cache folder the one for the smallest target that holds the length. Where
    there is none it is `self-extend:8,window=0.25x`, whose group is doubled where a text is longer than 6.25 L
    (docs/choose.md says why), or on a model that takes no position map `yarn:F`, F the ratio of the lengths rounded up.
    `model.describe()` says which.
    It stands alone, and only a model that ropewalk runs takes it.

    It has no facet of its own: asked for one, it raises ConfigError.
    """

    name: ClassVar[str] = "auto"
    source: ClassVar[str] = "the length of each request"
    depends_on_length: ClassVar[bool] = True

    def frequencies(self, rope: RopeSpec, length: int | None = None) -> Frequencies:
        _refuse()

    def bands(self, rope: RopeSpec, length: int | None = None) -> tuple[Band, ...]:
        _refuse()

    def logit_factor(self, positions: Tensor, rope: RopeSpec) -> Tensor:
        _refuse()

    def reach(self, rope: RopeSpec) -> float:
        _refuse()

    def check(self, rope: RopeSpec) -> None:
        _refuse()


def _refuse() -> NoReturn:
    raise ConfigError(
        "'auto' chooses a scaler by the length of each request, which only a model of ropewalk sees: "
        "rw.load(..., rope='auto') or model.rope = 'auto'; here name one scaler, such as self-extend:8,window=0.25x"
    )
