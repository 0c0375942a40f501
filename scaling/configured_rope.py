"""The rotary embedding that a model's config or file describes, and what a scaler makes of it."""

from __future__ import annotations

import dataclasses
import math

from torch import Tensor

from ..errors import ConfigError
from .band import Band
from .lengths import format_length
from .rope import RopeSpec, Scaler, compose


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConfiguredRope:
    """One rotary embedding as a model's config or file describes it.

    Args:
        rope: the plain geometry. `trained_length` is `original_max_position_embeddings` if the config states it (yarn,
            longrope and llama3 always do, linear rarely does), else `max_position_embeddings`.
        scaler: the config's scaling of the plain frequencies; `Scaler()` for the default type.
        max_length: the tokens that the config promises, by one rule for all types: `max_position_embeddings`, or the
            scaler's reach if the trained length is stated and `max_position_embeddings` is not above it.
        head_dim: the dimension of the whole head; None if all of it rotates.
        declares_trained_length: True if `max_position_embeddings` is the trained length although the scaler reaches
            further. Configs to which a user has added yarn, as model cards advise, look like this.
        temperature: the temperature that the model was trained with, which its own code applies under every scaler;
            None for most models.
        layers: the indices of the layers with this embedding; None if they are not known.
    """

    rope: RopeSpec
    scaler: Scaler
    max_length: int
    head_dim: int | None = None
    declares_trained_length: bool = False
    temperature: Scaler | None = None
    layers: tuple[int, ...] | None = None

    @classmethod
    def of(cls, rope: RopeSpec, scaler: Scaler, declared: int, *, head_dim: int | None = None) -> ConfiguredRope:
        """The rotary embedding with the scaler's reach as its length if `declared` is not above the trained length."""
        reach = scaler.reach(rope)
        is_trained = declared <= rope.trained_length and declared < reach < math.inf
        return cls(
            rope=rope,
            scaler=scaler,
            max_length=int(reach) if is_trained else declared,
            head_dim=head_dim,
            declares_trained_length=is_trained,
        )

    @property
    def scaling_text(self) -> str:
        """The config's own scaling in one line, without lists of factors; empty if it has none."""
        return self.scaler.brief if self.scaler.parts else ""

    @property
    def scaling_note(self) -> str:
        """A note on the config's own scaling and its length, to append to the trained length; empty if it has none."""
        if not self.scaling_text:
            return ""
        trained, reached = format_length(self.rope.trained_length), format_length(self.max_length)
        length = "" if reached == trained else f"{reached} "
        return f", {length}with the config's own {self.scaling_text} ({self._basis})"

    @property
    def _basis(self) -> str:
        """Where the reach of the config's own scaling comes from."""
        trained = format_length(self.rope.trained_length)
        if self.declares_trained_length:
            times = self.scaler.reach(self.rope) / self.rope.trained_length
            return f"{times:g} times {trained}; max_position_embeddings stays at {trained}"
        if self.max_length != self.rope.trained_length:
            return "max_position_embeddings"
        if math.isinf(self.scaler.reach(self.rope)):
            return "growing from max_position_embeddings"
        return (
            "max_position_embeddings; the length before scaling is not stated, "
            "original_max_position_embeddings in rope_parameters would state it"
        )

    def by_layer(self, scaler: Scaler) -> tuple[Scaler, ...]:
        """The different scalers of the layers under `scaler`; the methods below take one of these.

        Raises:
            ConfigError: the layers differ, and it is not known which layers have this embedding.
        """
        if not scaler.differs_by_layer:
            return (scaler,)
        if self.layers is None:
            raise ConfigError(f"{scaler}: it is not known which layers have which frequencies; use one for all layers")
        return tuple(dict.fromkeys(scaler.on(layer) for layer in self.layers))

    def effective(self, scaler: Scaler) -> Scaler:
        """`scaler`, joined with the model's own scaling if it does not set the frequencies itself."""
        return scaler if scaler.member("frequencies") else compose(*self.scaler.parts, *scaler.parts)

    def rope_for(self, scaler: Scaler) -> RopeSpec:
        """The geometry that `scaler` starts from. The model's own scaling counts as trained, unless the scaler
        replaces it."""
        if scaler.member("frequencies"):
            return self.rope
        return dataclasses.replace(self.rope, trained_length=self.max_length)

    def reach(self, scaler: Scaler) -> float:
        """The number of tokens that the model reaches under `scaler`, which may differ by layer.

        Raises:
            ConfigError: the scaler does not fit the geometry; a window above the trained length, say.
        """
        return min((self._reach(each) for each in self.by_layer(scaler)), default=math.inf)

    def _reach(self, scaler: Scaler) -> float:
        rope = self.rope_for(scaler)
        scaler.check(rope)
        if not scaler.member("frequencies") and math.isinf(self.scaler.reach(self.rope)):
            return math.inf
        return scaler.reach(rope)

    def check(self, scaler: Scaler) -> None:
        """Raise ConfigError if a scaler does not work here, or reaches less than the model's own scaling.

        Args:
            scaler: it may differ by layer.
        """
        for each in self.by_layer(scaler):
            self._check(each)

    def _check(self, scaler: Scaler) -> None:
        reach, limit, trained = self._reach(scaler), self.max_length, self.rope.trained_length
        if self.scaler.parts and reach < limit:
            raise ConfigError(
                f"{scaler} replaces this model's own {self.scaler.name} scaling and reaches "
                f"{format_length(int(reach))} tokens, fewer than its {format_length(limit)}; factors count from "
                f"{format_length(trained)}, so take a factor of at least {limit / trained:g}, or 'none'"
            )

    def bands(self, scaler: Scaler, length: int | None) -> tuple[Band, ...]:
        """The bands of `scaler` for a sequence of `length` tokens."""
        return scaler.bands(self.rope_for(scaler), length)

    def logit_factor(self, scaler: Scaler, positions: Tensor) -> Tensor:
        """Temperature of the queries at `positions`.

        Its L is the length that the model reads without a scaler, and its d is the dimension of the whole head.
        """
        dim = self.head_dim or self.rope.dim
        return scaler.logit_factor(positions, dataclasses.replace(self.rope, dim=dim, trained_length=self.max_length))
