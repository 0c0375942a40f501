"""What a model made of a trial."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TrialOutput:
    """The right answer's probability, and the answer that was written.

    Args:
        logprobs: nats of each token of the right answer, given the prompt and the answer's tokens before it; None
            from a server that does not tell.
        is_likeliest: every token of the right answer was the likeliest one; None where nobody said.
        written: its own answer, greedily.
    """

    logprobs: list[float] | None
    is_likeliest: bool | None
    written: str
