"""What clients ask for: JSON bodies of OpenAI's protocol, read strictly."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..engine.sampling import SamplingParams
from ..errors import ConfigError, did_you_mean

MOST_CHOICES = 16  # answers to one request
MOST_CONTEXTS, CONTEXT_TEXT = 256, 8 << 20  # of all answers of a request together, and their characters
MOST_STOPS, LONGEST_STOP = 16, 1000  # stop strings, and characters of one
LONGEST_TEXT, DEEPEST = 4096, 8  # characters of `rope`; lists and objects in one another, in a message
MOST_SCORES = 1 << 19  # log-probabilities of prompts' tokens, with their alternatives, in a request
_MOST_LOGPROBS = 20

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "stop", "max_time", "continuation")
"""Fields that are those of `SamplingParams`."""

_IGNORED = frozenset({"user", "metadata", "safety_identifier", "prompt_cache_key"})
"""Fields that say who asks, and nothing about the answer."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "best_of": (1,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "reasoning_effort": (),
    "functions": ([],),
    "store": (False,),
    "service_tier": ("auto", "default"),
}
"""Fields that are refused, and the values at which they change nothing."""


class BadRequest(ConfigError):
    """A body that cannot be answered.

    Attributes:
        field: the field that is wrong, if one is.
    """

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a request asks for.

    Attributes:
        prompts: texts or token ids of a completion; empty for a chat.
        messages: of a chat; empty for a completion.
        params: for every choice; the seed of choice k is `seed + k`.
        count: choices for every prompt.
        writes: False where `max_tokens` is 0 and only the prompt is scored.
        echo: the prompt belongs to the text.
        rope: the scaler of this request; None is the server's.
        contexts: texts that are read separately, each with the prompt.
        prompt_logprobs: as vLLM gives them, with this many likeliest tokens; None gives none.
        wants_logprobs: each token's log-probability is returned; `params.logprobs` counts the alternatives.
        stream, stream_usage: server-sent events, the last of them with token counts.
    """

    prompts: list[str | list[int]] = field(default_factory=list)
    messages: list[dict[str, Any]] = field(default_factory=list)
    params: SamplingParams
    count: int = 1
    writes: bool = True
    echo: bool = False
    rope: str | None = None
    contexts: list[str] = field(default_factory=list)
    prompt_logprobs: int | None = None
    stream: bool = False
    stream_usage: bool = False

    @property
    def is_chat(self) -> bool:
        return bool(self.messages)

    @property
    def wants_logprobs(self) -> bool:
        return self.params.logprobs is not None

    @property
    def scores_prompt(self) -> bool:
        """True if log-probabilities of the prompt's tokens are returned."""
        return self.prompt_logprobs is not None or (self.echo and self.wants_logprobs)

    @property
    def scored_alternatives(self) -> int:
        """Likeliest tokens that are returned for each token of a scored prompt."""
        return max(self.prompt_logprobs or 0, (self.params.logprobs or 0) if self.echo else 0)

    def check_scores(self, tokens: int) -> None:
        """Refuse prompts with more log-probabilities than are held at once.

        Args:
            tokens: of all prompts.

        Raises:
            BadRequest: with the numbers.
        """
        scores = self.count * tokens * (1 + self.scored_alternatives) if self.scores_prompt else 0
        if scores > MOST_SCORES:
            raise BadRequest(
                f"{scores:,} log-probabilities (the tokens of all prompts, each with its alternatives, for each of n "
                f"answers) are more than the {MOST_SCORES:,} of a request; ask for fewer alternatives or answers, or "
                "send fewer prompts at a time",
                "logprobs" if self.prompt_logprobs is None else "prompt_logprobs",
            )


def read_json(body: bytes) -> dict[str, Any]:
    """The JSON object of a body.

    Raises:
        BadRequest: it is none.
    """
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadRequest(f"the body is {_shown(value)}, not a JSON object")
    return value


class _Body:
    """The fields of a body, or of an object in it, each of them taken once.

    Args:
        where: the field that the object is in.
    """

    def __init__(self, fields: dict[str, Any], where: str = "") -> None:
        self._fields = {name: value for name, value in fields.items() if value is not None}
        self._known: set[str] = set()
        self._prefix = f"{where}." if where else ""

    def take(self, name: str, kind: str, valid: Callable[[Any], bool], default: Any = None) -> Any:
        self._known.add(name)
        if name not in self._fields:
            return default
        value = self._fields.pop(name)
        if not valid(value):
            field = self._prefix + name
            raise BadRequest(f"{field} must be {kind}, not {_shown(value)}", field)
        return value

    def flag(self, name: str) -> bool:
        return bool(self.take(name, "true or false", lambda value: isinstance(value, bool), False))

    def number(self, name: str, least: int, most: int | None = None, default: int | None = None) -> int | None:
        limits = f"at least {least}" if most is None else f"from {least} to {most}"

        def valid(value: Any) -> bool:
            return _is_int(value) and least <= value and (most is None or value <= most)

        value: int | None = self.take(name, f"a whole number {limits}", valid, default)
        return value

    def text(self, name: str) -> str | None:
        kind = f"a text of at most {LONGEST_TEXT:,} characters"
        value: str | None = self.take(name, kind, lambda value: isinstance(value, str) and len(value) <= LONGEST_TEXT)
        return value

    def sampling(self) -> dict[str, Any]:
        stops = f"a text, or a list of at most {MOST_STOPS}, of at most {LONGEST_STOP:,} characters each", _are_stops
        given = {
            name: self.take(name, *(stops if name == "stop" else ("a number or one word", _is_short)))
            for name in _SAMPLING
        }
        return {name: value for name, value in given.items() if value is not None}

    def finish(self) -> None:
        """Refuse what nobody took.

        Raises:
            BadRequest: a field is unknown, or asks for what this server does not do.
        """
        for name, value in self._fields.items():
            if not self._prefix and (name in _IGNORED or value in _NEUTRAL.get(name, ())):
                continue
            field = (self._prefix + name)[:100]
            if field in _NEUTRAL:
                raise BadRequest(f"{field} is not supported by this server; leave it out", field)
            raise BadRequest(f"{field!r} is no field of this request.{did_you_mean(name, self._known)}", field)


def read_completion(fields: dict[str, Any], *, default_tokens: int = 16) -> Asked:
    """The body of `/v1/completions`.

    Raises:
        BadRequest, ConfigError: a field is missing, wrong or not supported.
    """
    body = _Body(fields)
    prompts = _prompts(body.take("prompt", _PROMPT, lambda value: bool(_prompts(value))))
    if not prompts:
        raise BadRequest("the field prompt is missing", "prompt")
    logprobs = body.number("logprobs", 0, _MOST_LOGPROBS)
    most = body.number("max_tokens", 0, default=default_tokens)
    assert most is not None
    echo = body.flag("echo")
    prompt_logprobs = body.number("prompt_logprobs", 0, _MOST_LOGPROBS)
    asked = _common(
        body,
        {"max_new_tokens": max(1, most), "logprobs": logprobs},
        prompts=prompts,
        contexts=body.take("contexts", "a list of texts, at least one", lambda value: value and _are_texts(value), []),
        echo=echo,
        writes=most > 0,
        prompt_logprobs=prompt_logprobs,
    )
    if not asked.writes and not asked.scores_prompt and not echo:
        raise BadRequest("max_tokens 0 needs echo, which returns the prompt (with logprobs, its score)", "max_tokens")
    if asked.stream and asked.scores_prompt:
        raise BadRequest("log-probabilities of a prompt are not streamed; leave out stream", "stream")
    if asked.wants_logprobs and not asked.writes and not echo:
        raise BadRequest(
            "max_tokens 0 writes no tokens that logprobs could list; add echo, or leave it out", "logprobs"
        )
    if asked.scores_prompt and asked.params.continuation == "exact":
        raise BadRequest(
            "a prompt whose tokens are scored is continued after them; leave out continuation", "continuation"
        )
    if asked.scores_prompt and asked.params.max_time is not None:
        raise BadRequest("the scores of a prompt are given whole; leave out max_time", "max_time")
    if asked.contexts:
        _check_question(asked)
    return asked


def _check_question(asked: Asked) -> None:
    """Refuse what has no meaning with contexts, and contexts that would be read too often."""
    answers = asked.count * len(asked.prompts)
    if answers * len(asked.contexts) > MOST_CONTEXTS or answers * sum(map(len, asked.contexts)) > CONTEXT_TEXT:
        raise BadRequest(
            f"contexts are read for each answer (n times the prompts): at most {MOST_CONTEXTS} together, of "
            f"{CONTEXT_TEXT:,} characters; this request asks for {answers * len(asked.contexts):,}",
            "contexts",
        )
    if not all(isinstance(prompt, str) for prompt in asked.prompts):
        raise BadRequest("contexts need a prompt that is one text, not token ids", "prompt")
    if not all(str(prompt).strip() for prompt in asked.prompts):
        raise BadRequest("the prompt is blank; with contexts, it is the question that follows each of them", "prompt")
    for name, is_given in (("echo", asked.echo), ("prompt_logprobs", asked.prompt_logprobs is not None)):
        if is_given:
            raise BadRequest(f"with contexts, several prompts are read; leave out {name}", name)


def read_chat(fields: dict[str, Any], *, default_tokens: int) -> Asked:
    """The body of `/v1/chat/completions`.

    Raises:
        BadRequest, ConfigError: a field is missing, wrong or not supported.
    """
    body = _Body(fields)
    messages = body.take("messages", 'a list of {"role": ..., "content": ...}', lambda value: isinstance(value, list))
    if not messages:
        raise BadRequest("the field messages is missing or empty", "messages")
    most, older = body.number("max_completion_tokens", 1), body.number("max_tokens", 1)
    if most and older and most != older:
        raise BadRequest(f"max_completion_tokens is {most}, and max_tokens {older}; leave out one", "max_tokens")
    wanted = body.flag("logprobs")
    top = body.number("top_logprobs", 0, _MOST_LOGPROBS)
    if top and not wanted:
        raise BadRequest("top_logprobs needs logprobs: true", "top_logprobs")
    if body.take("contexts", "a list of texts", _are_texts):
        raise BadRequest("a chat has no contexts; they need a prompt that is one text, at /v1/completions", "contexts")
    return _common(
        body,
        {"max_new_tokens": most or older or default_tokens, "logprobs": (top or 0) if wanted else None},
        messages=[_message(number, message) for number, message in enumerate(messages)],
    )


def _common(body: _Body, sampling: dict[str, Any], **more: Any) -> Asked:
    """What both kinds of requests have."""
    body.text("model")
    options = _Body(
        body.take("stream_options", "an object", lambda value: isinstance(value, dict), {}), "stream_options"
    )
    asked = Asked(
        params=SamplingParams(**body.sampling(), **sampling),
        count=body.number("n", 1, MOST_CHOICES, 1),  # type: ignore[arg-type]
        rope=body.text("rope"),
        stream=body.flag("stream"),
        stream_usage=options.flag("include_usage"),
        **more,
    )
    options.finish()
    body.finish()
    if asked.stream_usage and not asked.stream:
        raise BadRequest("stream_options.include_usage needs stream: true; a whole answer has usage", "stream_options")
    return asked


_PROMPT = "a text, a list of token ids, or a list of either"


def _prompts(value: Any) -> list[str | list[int]]:
    """The prompts of a completion; none if it is no prompt."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        return []
    if all(map(_is_int, value)):
        return [value]
    if all(isinstance(part, str) or (isinstance(part, list) and part and all(map(_is_int, part))) for part in value):
        return list(value)
    return []


def _message(number: int, message: Any) -> dict[str, Any]:
    """A message whose content is one text."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise BadRequest(
            f'messages[{number}] must be an object such as {{"role": "user", "content": "Hello"}}', "messages"
        )
    content = message.get("content")
    if isinstance(content, list):
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
        ]
        if not all(isinstance(part, str) for part in parts):
            raise BadRequest(
                f"messages[{number}] holds a part that is no text; this server reads texts only", "messages"
            )
        content = "".join(map(str, parts))
    if not isinstance(content, str):
        raise BadRequest(f"messages[{number}] must have a text as its content", "messages")
    more = {name: value for name, value in message.items() if name != "content"}
    if not _is_within(more, DEEPEST):
        raise BadRequest(f"messages[{number}] holds lists or objects in one another, more than {DEEPEST}", "messages")
    return {**more, "content": content}


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(part, str) for part in value)


def _are_stops(value: Any) -> bool:
    texts = [value] if isinstance(value, str) else value
    return _are_texts(texts) and len(texts) <= MOST_STOPS and all(len(text) <= LONGEST_STOP for text in texts)


def _is_short(value: Any) -> bool:
    return not isinstance(value, list | dict) and not (isinstance(value, str) and len(value) > 100)


def _is_within(value: Any, depth: int) -> bool:
    """True if `value` has at most `depth` lists and objects in one another."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return parts is None or (depth > 0 and all(_is_within(part, depth - 1) for part in parts))


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    if value and isinstance(value, list | dict):  # may be nested more deeply than JSON can be written
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value):,}"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
