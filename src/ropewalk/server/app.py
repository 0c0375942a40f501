"""The server's routes: from a request to its answer."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from ..engine.chat_template import chat_ids
from ..engine.completion import Completion, Token
from ..engine.model import Model
from ..engine.prompt_score import ScoredSequence
from ..engine.scheduler import QueueFull, Request, Scheduler, Update
from ..engine.sequence import Sequence
from ..errors import ContextOverflow, OutOfMemory, RopewalkError, Setting, did_you_mean
from . import answers
from .metrics import Metrics
from .requests import Asked, BadRequest, read_chat, read_completion, read_json

_LOG = logging.getLogger("ropewalk.server")
_PATIENCE = 0.5  # seconds between two looks whether a client is still there


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a server takes.

    Attributes:
        rows: answers that are written together.
        queue: requests that wait beside those.
        cache_bytes: of keys and values that are held for prompts which begin like earlier ones.
        body_bytes: of a request.
        chat_tokens: most tokens of an answer in a chat that asks for no number.
    """

    rows: int = 8
    queue: int = 64
    cache_bytes: int = 1 << 30
    body_bytes: int = 32 << 20
    chat_tokens: int = 1024


class _EventStream(StreamingResponse):
    """A stream of events, and what is called when it ends, even if the client went away before the first event."""

    def __init__(self, events: AsyncIterator[bytes], ended: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._ended()


class _Choice:
    """One of the answers to a request, while it is written."""

    def __init__(self, index: int, sequence: Sequence, queue: asyncio.Queue[tuple[_Choice, Update]]) -> None:
        self.index, self.sequence = index, sequence
        self.texts: list[str] = []
        self.tokens: list[Token] = []
        self.completion: Completion | None = None
        self.ended = False
        self.request: Request
        self._queue, self._loop = queue, asyncio.get_running_loop()

    def report(self, update: Update) -> None:
        """Called by the scheduler's thread."""
        self._loop.call_soon_threadsafe(self._queue.put_nowait, (self, update))


class ModelServer:
    """A model behind OpenAI's protocol.

    Args:
        name: what clients call the model.
        api_key: clients have to send it, if given.
    """

    def __init__(self, model: Model, name: str, *, api_key: str | None = None, limits: Limits | None = None) -> None:
        self.model, self.name, self._key, self._limits = model, name, api_key, limits or Limits()
        self.scheduler = Scheduler(
            model, rows=self._limits.rows, waiting=self._limits.queue, cache_bytes=self._limits.cache_bytes
        )
        self.metrics = Metrics(self.scheduler)
        self._texts = answers.TokenTexts(model.vocabulary, model.tokenizer)
        self._created = int(time.time())

    def app(self) -> Starlette:
        """The ASGI application. When it shuts down, it finishes what was asked."""

        @asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            yield
            await run_in_threadpool(self.scheduler.close)

        routes = [
            Route("/health", self._answered(self.health, protected=False), methods=["GET"]),
            Route("/metrics", self._answered(self.show_metrics), methods=["GET"]),
            Route("/v1/models", self._answered(self.models), methods=["GET"]),
            Route("/v1/models/{name:path}", self._answered(self.one_model), methods=["GET"]),
            Route("/v1/completions", self._answered(self.completions), methods=["POST"]),
            Route("/v1/chat/completions", self._answered(self.chat), methods=["POST"]),
        ]
        return Starlette(routes=routes, lifespan=lifespan, exception_handlers={HTTPException: _http_error})

    async def health(self, _: HttpRequest) -> Response:
        return JSONResponse({"status": "ok"})

    async def show_metrics(self, _: HttpRequest) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self, _: HttpRequest) -> Response:
        return JSONResponse({"object": "list", "data": [self._listed()]})

    async def one_model(self, request: HttpRequest) -> Response:
        self._check_model(request.path_params["name"])
        return JSONResponse(self._listed())

    async def completions(self, request: HttpRequest) -> Response:
        """`/v1/completions`."""
        asked = await self._read(request, read_completion)
        return await self._answer(request, asked, "cmpl", "text_completion")

    async def chat(self, request: HttpRequest) -> Response:
        """`/v1/chat/completions`."""
        asked = await self._read(request, partial(read_chat, default_tokens=self._limits.chat_tokens))
        return await self._answer(request, asked, "chatcmpl", "chat.completion")

    async def _read(self, request: HttpRequest, read: Callable[[dict[str, Any]], Asked]) -> Asked:
        limit = self._limits.body_bytes
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > limit:
                raise HTTPException(413, f"the body has more than the {limit:,} bytes that this server takes")
        fields = read_json(bytes(body))
        if isinstance(name := fields.get("model"), str):
            self._check_model(name)
        return read(fields)

    def _check_model(self, name: str) -> None:
        if name not in (self.name, self.model.name):
            raise HTTPException(404, f"this server has no model {name!r}.{did_you_mean(name, [self.name])}")

    def _listed(self) -> dict[str, Any]:
        limit = self.model.max_length
        return {
            "id": self.name,
            "object": "model",
            "created": self._created,
            "owned_by": "ropewalk",
            "max_model_len": limit if limit < 2**31 else None,
            "rope": str(self.model.rope),
        }

    async def _answer(self, request: HttpRequest, asked: Asked, kind: str, form: str) -> Response:
        started = time.monotonic()
        queue: asyncio.Queue[tuple[_Choice, Update]] = asyncio.Queue()
        choices = await run_in_threadpool(self._choices, asked)
        live = [_Choice(index, sequence, queue) for index, (sequence, _, _) in enumerate(choices)]
        for choice, (sequence, scaler, length) in zip(live, choices, strict=True):
            choice.request = Request(sequence, scaler, length, choice.report)
        self.scheduler.submit(*(choice.request for choice in live))
        header = answers.Header.new(kind, self.name)
        updates = self._updates(request, live, queue, started)
        if asked.stream:
            return _EventStream(self._events(asked, header, live, updates), partial(self._stop, live))
        try:
            async for choice, update in updates:
                choice.texts.append(update.text)
                choice.tokens += update.tokens
        finally:
            self._stop(live)
        done = [self._choice(asked, choice) for choice in live]
        return JSONResponse(header.object(form, done, self._usage(asked, live)))

    def _choices(self, asked: Asked) -> list[tuple[Sequence, Any, int]]:
        """A sequence for every answer, with its scaler and length."""
        model, params = self.model, asked.params
        plan = self.scheduler.plan(asked.rope)
        prompts: list[Any] = list(asked.prompts)
        if asked.messages:
            prompts = [chat_ids(asked.messages, model.tokenizer, model.vocabulary)]
        if asked.contexts and (asked.messages or not all(isinstance(prompt, str) for prompt in prompts)):
            raise BadRequest("contexts need a prompt that is one text, at /v1/completions", "contexts")
        if asked.scores_prompt:
            params = replace(params, continuation="off")  # the prompt's tokens are shown as they are scored
        choices = []
        for prompt in prompts:
            for number in range(asked.count):
                seed = None if params.seed is None else params.seed + number
                sequence = self._sequence(asked, prompt, replace(params, seed=seed), plan)
                choices.append((sequence, plan.at(sequence.length), sequence.length))
        return choices

    def _sequence(self, asked: Asked, prompt: Any, params: Any, plan: Any) -> Sequence:
        model = self.model
        if asked.contexts:
            return model.over_contexts(prompt, asked.contexts, "entropy", params, plan=plan)
        read = model.read(prompt, params.continuation, plan=plan)
        model.check_length(len(read.ids), params, plan=plan)
        parts = (read, params, model.vocabulary, model.stop_ids)
        if asked.scores_prompt:
            most = max(asked.prompt_logprobs or 0, (params.logprobs or 0) if asked.echo else 0)
            return ScoredSequence(*parts, alternatives=most, writes=asked.writes)
        sequence = Sequence(*parts)
        if not asked.writes:
            sequence.end("length")
        return sequence

    async def _updates(
        self, request: HttpRequest, live: list[_Choice], queue: asyncio.Queue[tuple[_Choice, Update]], started: float
    ) -> AsyncIterator[tuple[_Choice, Update]]:
        """What happens to the answers, until all have ended.

        Raises:
            ClientDisconnect: it went away.
        """
        first, looked = True, started
        while not all(choice.ended for choice in live):
            if (now := time.monotonic()) > looked + _PATIENCE:
                looked = now
                if await request.is_disconnected():
                    raise ClientDisconnect
            try:
                choice, update = await asyncio.wait_for(queue.get(), _PATIENCE)
            except TimeoutError:
                continue
            choice.ended = update.is_last
            if update.error is not None:
                raise update.error
            if first and update.tokens:
                self.metrics.first_token_seconds.observe(time.monotonic() - started)
                first = False
            if update.completion is not None:
                choice.completion = update.completion
                self._count(choice)
            yield choice, update
        self.metrics.seconds.observe(time.monotonic() - started)

    def _stop(self, live: list[_Choice]) -> None:
        """Cancel the answers that have not ended."""
        unfinished = [choice.request for choice in live if not choice.ended]
        self.metrics.cancelled.inc(len(unfinished))
        self.scheduler.cancel(*unfinished)

    def _count(self, choice: _Choice) -> None:
        assert choice.completion is not None
        self.metrics.prompt_tokens.inc(choice.completion.usage.prompt_tokens)
        self.metrics.cached_tokens.inc(choice.sequence.reused)
        self.metrics.written_tokens.inc(choice.completion.usage.completion_tokens)

    def _usage(self, asked: Asked, live: list[_Choice]) -> dict[str, Any]:
        """Token counts. A prompt with several answers counts once."""
        counts = [choice.completion.usage for choice in live if choice.completion is not None]
        return answers.usage(
            sum(count.prompt_tokens for count in counts[:: asked.count]),
            sum(count.completion_tokens for count in counts),
            sum(choice.sequence.reused for choice in live[:: asked.count]),
        )

    def _choice(self, asked: Asked, choice: _Choice) -> dict[str, Any]:
        """A whole answer."""
        completion = choice.completion
        assert completion is not None
        text = "".join(choice.texts)
        answer: dict[str, Any] = {"index": choice.index, "finish_reason": answers.finish_reason(completion)}
        if completion.sources is not None:
            answer["sources"] = completion.sources
        if asked.messages:
            shown = answers.chat_logprobs(self._texts, choice.tokens) if asked.wants_logprobs else None
            return {**answer, "message": {"role": "assistant", "content": text}, "logprobs": shown}
        logprobs = None
        if asked.wants_logprobs:
            logprobs = self._completion_logprobs(asked, choice)
        if asked.prompt_logprobs is not None and isinstance(choice.sequence, ScoredSequence):
            answer["prompt_logprobs"] = answers.prompt_logprobs(self._texts, choice.sequence.scored)
        if asked.echo:
            text = self._prompt_text(choice.sequence) + text
        return {**answer, "text": text, "logprobs": logprobs}

    def _completion_logprobs(self, asked: Asked, choice: _Choice) -> dict[str, Any]:
        table = answers.CompletionLogprobs(self._texts, asked.params.logprobs or 0)
        if asked.echo and isinstance(choice.sequence, ScoredSequence):
            table.add(choice.sequence.prompt.ids[0], None, None)
            for scored in choice.sequence.scored:
                top = dict(list(scored.top.items())[: asked.params.logprobs])
                table.add(scored.id, scored.logprob, top)
        for token in choice.tokens:
            table.add(token.id, token.logprob, token.top)
        return table.take()

    def _prompt_text(self, sequence: Sequence) -> str:
        return self.model.vocabulary.text_bytes(sequence.prompt.ids).decode(errors="replace")

    async def _events(
        self,
        asked: Asked,
        header: answers.Header,
        live: list[_Choice],
        updates: AsyncIterator[tuple[_Choice, Update]],
    ) -> AsyncIterator[bytes]:
        """The answers as server-sent events."""
        form = "chat.completion.chunk" if asked.messages else "text_completion"
        tables = {choice: answers.CompletionLogprobs(self._texts, asked.params.logprobs or 0) for choice in live}
        for choice in live:
            if asked.messages:
                delta = {"role": "assistant", "content": ""}
                yield answers.sse(header.object(form, [{"index": choice.index, "delta": delta, "finish_reason": None}]))
            elif asked.echo:
                yield answers.sse(header.object(form, [_text_chunk(choice.index, self._prompt_text(choice.sequence))]))
        try:
            async for choice, update in updates:
                reason = None if update.completion is None else answers.finish_reason(update.completion)
                if not (update.text or reason or (update.tokens and asked.wants_logprobs)):
                    continue
                if asked.messages:
                    chunk = {"index": choice.index, "delta": {"content": update.text}, "finish_reason": reason}
                    if reason and not update.text:
                        chunk["delta"] = {}
                    if asked.wants_logprobs:
                        chunk["logprobs"] = answers.chat_logprobs(self._texts, update.tokens)
                else:
                    chunk = _text_chunk(choice.index, update.text, reason)
                    if asked.wants_logprobs:
                        for token in update.tokens:
                            tables[choice].add(token.id, token.logprob, token.top)
                        chunk["logprobs"] = tables[choice].take()
                yield answers.sse(header.object(form, [chunk]))
        except ClientDisconnect:
            return
        except Exception as error:
            _, body = _described(error)
            yield answers.sse(body)
            return
        if asked.stream_usage:
            yield answers.sse(header.object(form, [], self._usage(asked, live)))
        yield answers.sse("[DONE]")

    def _answered(
        self, handler: Callable[[HttpRequest], Awaitable[Response]], *, protected: bool = True
    ) -> Callable[[HttpRequest], Awaitable[Response]]:
        """`handler` with the key checked, errors as JSON, and the request counted."""

        async def handle(request: HttpRequest) -> Response:
            try:
                if protected:
                    self._check_key(request)
                response = await handler(request)
            except ClientDisconnect:
                response = Response(status_code=499)
            except HTTPException as error:
                response = await _http_error(request, error)
            except Exception as error:
                status, body = _described(error)
                response = JSONResponse(body, status, headers={"Retry-After": "5"} if status in (429, 503) else None)
            self.metrics.requests.labels(request.scope["route"].path, response.status_code).inc()
            return response

        return handle

    def _check_key(self, request: HttpRequest) -> None:
        if self._key is None:
            return
        kind, _, key = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), self._key.encode()):
            raise HTTPException(401, "this server wants its API key: Authorization: Bearer KEY")


def _text_chunk(index: int, text: str, reason: str | None = None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}


_FIELDS = {"max_new_tokens": "max_tokens"}
"""Fields of requests whose settings have other names in Python."""


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
        return f"{name} {part.value}" if part.form == "given" else f"give {json.dumps(name)}: {json.dumps(part.value)}"

    return "".join(map(shown, error.args))


def _error(message: str, kind: str, code: str | None = None, field: str | None = None) -> dict[str, Any]:
    return {"error": {"message": _printable(message), "type": kind, "param": field and _printable(field), "code": code}}


def _printable(text: str) -> str:
    """`text` in which half a surrogate pair, which UTF-8 cannot hold, is written as \\ud800."""
    return text.encode(errors="backslashreplace").decode()


def _described(error: Exception) -> tuple[int, dict[str, Any]]:
    """Status and body for an error."""
    if isinstance(error, QueueFull):
        return 429, _error(_message(error), "rate_limit_error", "queue_full")
    if isinstance(error, OutOfMemory):
        return 503, _error(_message(error), "server_error", "out_of_memory")
    if isinstance(error, ContextOverflow):
        return 400, _error(_message(error), "invalid_request_error", "context_length_exceeded")
    if isinstance(error, RopewalkError):
        return 400, _error(_message(error), "invalid_request_error", field=getattr(error, "field", None))
    _LOG.exception("a request failed", exc_info=error)
    return 500, _error("the server failed; its log says why", "server_error")


async def _http_error(_: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    kind = {401: "authentication_error", 404: "not_found_error"}.get(error.status_code, "invalid_request_error")
    headers = {"WWW-Authenticate": "Bearer"} if error.status_code == 401 else error.headers
    return JSONResponse(_error(error.detail, kind), error.status_code, headers=headers)
