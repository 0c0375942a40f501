"""The ways in which servers tell the log-probabilities of a prompt's own tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Scored = tuple[float, bool | None]
"""Nats of a token, and whether it was the likeliest one; None where the server does not say."""

Choice = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class LogprobForm:
    """How to ask for them, and where they are in the answer.

    Args:
        name: for people.
        fields: of the request.
        read: of a choice and the prompt's ids: what was asked of all ids but the first; None if it
            is not there.
    """

    name: str
    fields: dict[str, Any]
    read: Callable[[Choice, Sequence[int]], list[Scored] | None]


def _read_prompt_logprobs(choice: Choice, ids: Sequence[int]) -> list[Scored] | None:
    places = choice.get("prompt_logprobs")
    if not isinstance(places, list) or len(places) != len(ids):
        return None
    scored: list[Scored] = []
    for token, place in zip(ids[1:], places[1:], strict=True):
        entry = (place or {}).get(str(token)) or {}
        if entry.get("logprob") is None:
            return None
        scored.append((float(entry["logprob"]), entry["rank"] == 1 if entry.get("rank") else None))
    return scored


def _read_echo(choice: Choice, ids: Sequence[int]) -> list[Scored] | None:
    logprobs = choice.get("logprobs") or {}
    nats = logprobs.get("token_logprobs")
    if not isinstance(nats, list) or len(nats) not in (len(ids), len(ids) + 1):  # with the token that was written
        return None
    nats = nats[1 : len(ids)]
    if None in nats:
        return None
    tops = (logprobs.get("top_logprobs") or [None] * len(ids))[1 : len(ids)]
    return [(float(n), n >= max(top.values()) if top else None) for n, top in zip(nats, tops, strict=True)]


FORMS = (
    LogprobForm(name="prompt_logprobs", fields={"prompt_logprobs": 1}, read=_read_prompt_logprobs),
    LogprobForm(name="echo", fields={"echo": True, "logprobs": 1}, read=_read_echo),
)
"""vLLM's own, and OpenAI's from the time before chat, which SGLang has too. The first that a server
knows is used."""
