"""What a model's config or file says about its RoPE: geometry, scaling, and the length that it promises."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from ..errors import ConfigError
from .lengths import format_length
from .longrope import LongRoPE
from .rope import RopeSpec, Scaler, compose

__all__ = ["ConfiguredRope"]


@dataclass(frozen=True, kw_only=True)
class ConfiguredRope:
    """One rotary embedding as a config describes it.

    Args:
        rope: the plain geometry; `trained_length` is `original_max_position_embeddings` where that is stated (by yarn,
            longrope and llama3 always, by linear rarely), else `max_position_embeddings`.
        scaler: what the config does to the plain frequencies; `Scaler()` for the default type.
        max_length: the tokens that the config promises to carry, by one rule for all types: `max_position_embeddings`,
            or the scaler's reach where the trained length is stated and `max_position_embeddings` is no more.
        head_dim: the whole head; None where all of it rotates.
        stays_behind: `max_position_embeddings` is the trained length, and the scaler reaches further. Model cards add
            yarn to a config in this way.
    """

    rope: RopeSpec
    scaler: Scaler
    max_length: int
    head_dim: int | None = None
    stays_behind: bool = False

    @classmethod
    def of(cls, rope: RopeSpec, scaler: Scaler, declared: int, *, head_dim: int | None = None) -> ConfiguredRope:
        """With the length that the scaler reaches, where `declared` is no more than the trained one."""
        reach = scaler.reach(rope)
        stays_behind = declared <= rope.trained_length and declared < reach < math.inf
        length = int(reach) if stays_behind else declared
        return cls(rope=rope, scaler=scaler, max_length=length, head_dim=head_dim, stays_behind=stays_behind)

    @property
    def own(self) -> str:
        """The config's own scaling in one line, without its lists of factors; empty if it has none."""
        if isinstance(self.scaler, LongRoPE):
            return f"longrope:{self.scaler.factor:g} with {len(self.scaler.long)} factors"
        return str(self.scaler) if self.scaler.parts else ""

    @property
    def stretched(self) -> str:
        """What the config's own scaling makes of the trained length, to be put behind it; empty if it has none."""
        if not self.own:
            return ""
        trained, carried = format_length(self.rope.trained_length), format_length(self.max_length)
        length = "" if carried == trained else f"{carried} "
        return f", {length}with the config's own {self.own} ({self._basis})"

    @property
    def _basis(self) -> str:
        """What the reach of the config's own scaling is read from."""
        trained = format_length(self.rope.trained_length)
        if self.stays_behind:
            times = self.scaler.reach(self.rope) / self.rope.trained_length
            return f"{times:g} times {trained}; max_position_embeddings stays at {trained}"
        if self.max_length != self.rope.trained_length:
            return "max_position_embeddings"
        if math.isinf(self.scaler.reach(self.rope)):
            return "growing from max_position_embeddings"
        return (
            "max_position_embeddings; the length before scaling is not stated, "
            "original_max_position_embeddings in rope_parameters does"
        )

    def effective(self, scaler: Scaler) -> Scaler:
        """`scaler`, over the model's own frequencies where it does not set them."""
        return scaler if scaler.member("frequencies") else compose(*self.scaler.parts, *scaler.parts)

    def rope_for(self, scaler: Scaler) -> RopeSpec:
        """The geometry that `scaler` starts from: what is trained includes the model's own scaling, unless the
        scaler replaces that."""
        if scaler.member("frequencies"):
            return self.rope
        return dataclasses.replace(self.rope, trained_length=self.max_length)

    def reach(self, scaler: Scaler) -> float:
        """Tokens that the model is meant to carry under `scaler`."""
        if not scaler.member("frequencies") and math.isinf(self.scaler.reach(self.rope)):
            return math.inf
        return scaler.reach(self.rope_for(scaler))

    def check(self, scaler: Scaler) -> None:
        """Refuse a scaler that cannot work here, or that would shorten what the model's own scaling gives."""
        scaler.check(self.rope_for(scaler))
        reach, own, trained = self.reach(scaler), self.max_length, self.rope.trained_length
        if self.scaler.parts and reach < own:
            raise ConfigError(
                f"{scaler} replaces this model's own {self.scaler.name} scaling and reaches "
                f"{format_length(int(reach))} tokens, fewer than its {format_length(own)}; factors count from "
                f"{format_length(trained)}, so ask for one of at least {own / trained:g}, or 'none'"
            )
