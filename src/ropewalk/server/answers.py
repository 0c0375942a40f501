"""What clients get: the JSON objects of OpenAI's protocol, answers and errors."""

from __future__ import annotations

import json
import logging
import math
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from ..engine.completion import Completion, Token
from ..engine.prompt_score import ScoredToken
from ..engine.scheduler import QueueFull
from ..errors import ContextOverflow, OutOfMemory, RopewalkError, Setting
from ..tokenizer_tools.stream import TextStream
from ..tokenizer_tools.token_texts import TokenTexts

_LOG = logging.getLogger("ropewalk.server")
_FIELDS = {"max_new_tokens": "max_tokens"}  # settings whose fields in a request have other names
_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
_FINISH_REASONS = {"time": "length"}  # OpenAI's protocol has no word for it


@dataclass(frozen=True, kw_only=True)
class Header:
    """What every object of an answer begins with."""

    id: str
    created: int
    model: str

    @classmethod
    def new(cls, kind: str, model: str) -> Header:
        return cls(id=f"{kind}-{uuid.uuid4().hex}", created=int(time.time()), model=model)

    def object(self, kind: str, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> dict[str, Any]:
        answer = {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}
        return answer if usage is None else {**answer, "usage": usage}


def sse(payload: dict[str, Any] | str) -> bytes:
    """A server-sent event."""
    text = payload if isinstance(payload, str) else _JSON.encode(payload)
    return f"data: {text}\n\n".encode()


def encoded(value: dict[str, Any]) -> bytes:
    """An answer as JSON, in small pieces: while one is written, Python runs no other thread."""

    def text(value: Any, levels: int) -> str:
        if levels and isinstance(value, dict):
            return (
                "{" + ",".join(f"{_JSON.encode(name)}:{text(part, levels - 1)}" for name, part in value.items()) + "}"
            )
        if levels and isinstance(value, list):
            return "[" + ",".join(text(part, levels - 1) for part in value) + "]"
        return _JSON.encode(value)

    return text(value, 5).encode()


def error_object(message: str, kind: str, code: str | None = None, field: str | None = None) -> dict[str, Any]:
    """The body of an error.

    Args:
        kind: its type, such as "invalid_request_error".
        field: the field of the request that is wrong, if one is.
    """
    return {"error": {"message": _printable(message), "type": kind, "param": field and _printable(field), "code": code}}


def described(error: Exception, own: str, name: str) -> tuple[int, dict[str, Any]]:
    """Status and body for an error. One that ropewalk does not raise on purpose goes to the log.

    Args:
        own: the model's name in messages, which may be a path.
        name: what clients call the model.
    """
    message = _message(error).replace(own, name)
    if isinstance(error, QueueFull):
        return 429, error_object(message, "rate_limit_error", "queue_full")
    if isinstance(error, OutOfMemory):
        return 503, error_object(message, "server_error", "out_of_memory")
    if isinstance(error, ContextOverflow):
        return 400, error_object(message, "invalid_request_error", "context_length_exceeded")
    if isinstance(error, RopewalkError):
        return 400, error_object(message, "invalid_request_error", field=getattr(error, "field", None) or _given(error))
    _LOG.exception("a request failed", exc_info=error)
    return 500, error_object("the server failed; its log says why", "server_error")


def _message(error: Exception) -> str:
    """The message of an error with its settings as a client or the server's owner gives them."""

    def shown(part: object) -> str:
        if not isinstance(part, Setting):
            return str(part)
        name = _FIELDS.get(part.name, part.name)
        if part.form == "load":
            return f"serve the model with --{part.name.replace('_', '-')} {part.value}"
        if part.form == "name":
            return name
        if part.form == "given":
            return f"{name} {part.value}"
        field = f"{json.dumps(name)}: {json.dumps(part.value)}"
        return f"give {field}" if part.form == "model" else field

    return "".join(map(shown, error.args))


def _given(error: RopewalkError) -> str | None:
    """The field of the request whose value an error of the model's names as wrong."""
    wrong = (part.name for part in error.args if isinstance(part, Setting) and part.form in ("given", "name"))
    name = next(wrong, None)
    return _FIELDS.get(name, name) if name else None


def _printable(text: str) -> str:
    """`text` in which half a surrogate pair, which UTF-8 cannot hold, is written as \\ud800."""
    return text.encode(errors="backslashreplace").decode()


def text_chunk(index: int, text: str, reason: str | None = None) -> dict[str, Any]:
    """A choice of an event of `/v1/completions`."""
    return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}


def finish_reason(completion: Completion) -> str:
    return _FINISH_REASONS.get(completion.finish_reason, completion.finish_reason)


def usage(prompt_tokens: int, completion_tokens: int, cached: int) -> dict[str, Any]:
    """Token counts.

    Args:
        cached: tokens of the prompts that an earlier request had read.
    """
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


@dataclass
class CompletionLogprobs:
    """The `logprobs` of a choice of `/v1/completions`, token by token.

    Args:
        stream: makes the text of the choice, in which `text_offset` counts. Special tokens have none there.
        alternatives: likeliest tokens shown for each.
    """

    texts: TokenTexts
    stream: TextStream
    alternatives: int
    tokens: list[str] = field(default_factory=list)
    token_logprobs: list[float | None] = field(default_factory=list)
    top_logprobs: list[dict[str, float | None] | None] = field(default_factory=list)
    text_offset: list[int] = field(default_factory=list)
    _length: int = 0  # characters so far

    def add_written(self, token: Token) -> None:
        """Add a token of the answer. The first may begin inside the prompt."""
        self.add(token.id, token.logprob, token.top, 0 if token.healing is None else token.healing.overlap)

    def add(self, token: int, logprob: float | None, top: dict[int, float] | None, overlap: int = 0) -> None:
        """Add a token.

        Args:
            overlap: bytes of it that belong to a text before.
        """
        self.tokens.append(self.texts.text(token))
        self.token_logprobs.append(_finite(logprob))
        named = None
        if top is not None and logprob is not None and self.alternatives:
            named = {self.texts.text(other): _finite(value) for other, value in top.items()}
            named.setdefault(self.texts.text(token), _finite(logprob))
        self.top_logprobs.append(named)
        self.text_offset.append(self._length)
        self._length += len(self.stream.push(token, overlap))

    def take(self) -> dict[str, Any]:
        """What was added since the last call."""
        taken = {name: getattr(self, name) for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")}
        for name in taken:
            setattr(self, name, [])
        return taken


def chat_logprobs(texts: TokenTexts, tokens: list[Token]) -> dict[str, Any]:
    """The `logprobs` of a choice of a chat."""
    return {
        "content": [
            {
                **_chat_token(texts, token.id, token.logprob),
                "top_logprobs": [_chat_token(texts, other, value) for other, value in (token.top or {}).items()],
            }
            for token in tokens
        ]
    }


def prompt_logprobs(texts: TokenTexts, scored: list[ScoredToken]) -> list[dict[str, Any] | None]:
    """Log-probabilities of a prompt's tokens as vLLM gives them; the first token has none."""
    listed: list[dict[str, Any] | None] = [None]
    for token in scored:
        ranked = {other: (value, rank) for rank, (other, value) in enumerate(token.top.items(), 1)}
        ranked.setdefault(token.id, (token.logprob, token.rank))
        listed.append(
            {
                str(other): {"logprob": _finite(value), "rank": rank, "decoded_token": texts.text(other)}
                for other, (value, rank) in ranked.items()
            }
        )
    return listed


def _chat_token(texts: TokenTexts, token: int, logprob: float | None) -> dict[str, Any]:
    data = texts.data(token)
    return {"token": texts.text(token), "logprob": _finite(logprob), "bytes": list(data)}


def _finite(logprob: float | None) -> float | None:
    """JSON has no infinity: what cannot be drawn is written as OpenAI does."""
    return logprob if logprob is None or math.isfinite(logprob) else -9999.0
