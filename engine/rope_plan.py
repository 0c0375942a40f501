"""The scaler of a request at every length, and the most tokens that a request may have under it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import ContextOverflow, Setting
from ..scaling.lengths import format_length
from ..scaling.rope import Scaler
from .auto import Choice
from .sampling import SamplingParams

_ANY_LENGTH = 2**31  # more than any text has


@dataclass(frozen=True, kw_only=True)
class RopePlan:
    """The scaler of a request, at every length.

    Attributes:
        rope: the scaler that was assigned or requested.
        choice: what "auto" chooses; None for any other scaler.
        reach: tokens that the scaler reaches; infinity for any length.
        given_max_length: the limit that the user set, or None.
    """

    rope: Scaler
    choice: Choice | None = None
    reach: float
    given_max_length: int | None

    def at(self, length: int | None) -> Scaler:
        """The scaler for a text of `length` tokens. None means a length within the trained one."""
        return self.rope if self.choice is None else self.choice.at(length)

    @property
    def max_length(self) -> int:
        """Most tokens that a request may have, prompt and answer together: `given_max_length`, else `reach`."""
        if self.given_max_length is not None:
            return self.given_max_length
        return int(self.reach) if math.isfinite(self.reach) else _ANY_LENGTH

    def check(self, tokens: int, params: SamplingParams, name: str) -> None:
        """Refuse a prompt and an answer that are more than `max_length` tokens.

        Args:
            tokens: of the prompt.
            name: of the model.

        Raises:
            ContextOverflow: with the numbers.
        """
        total, limit = tokens + params.max_new_tokens, self.max_length
        if total <= limit:
            return
        anyway, auto = Setting("max_length", total, "load"), Setting("rope", "auto", "model")
        less: tuple[str | Setting, ...] = ("shorten the prompt",)
        if tokens < limit:
            less = ("ask for at most ", Setting("max_new_tokens", limit - tokens))
        if self.given_max_length is None:
            most = f"reaches with rope {str(self.rope)!r}"
            ways: list[str | Setting] = [*less, ", or ", anyway, " to go there anyway"]
            if self.reach < _ANY_LENGTH:
                ways = [auto, ", ", *ways]
        else:
            most = "was loaded for"
            ways = [*less, ", or raise ", Setting("max_length", form="name"), f" to {total}"]
            ways += [] if total <= self.reach else [" and ", auto]
        raise ContextOverflow(
            f"{tokens} prompt token{'' if tokens == 1 else 's'} and ",
            Setting("max_new_tokens", params.max_new_tokens, "given"),
            f" make {total}, more than the {format_length(limit)} that {name} {most}; ",
            *ways,
        )

    def __str__(self) -> str:
        return str(self.rope) if self.choice is None else f"{self.rope}: {self.choice}"
