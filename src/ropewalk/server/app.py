"""The server's routes, its key, and the reading of bodies."""

from __future__ import annotations

import asyncio
import hmac
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from ..engine.model import Model
from ..engine.scheduler import Scheduler
from ..errors import did_you_mean
from . import answers
from .bodies import Bodies
from .connection import host_name, is_loopback
from .job import PATIENCE, Job
from .metrics import Metrics
from .requests import Asked, read_chat, read_completion, read_json

_LARGE = 256 << 10  # bytes of a body; larger ones are prepared one by one


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a server takes.

    Attributes:
        rows: requests that are answered at a time.
        queue: requests that wait beside those.
        cache_bytes: of keys and values that are held for prompts which begin like earlier ones.
        body_bytes: of a request.
        chat_tokens: most tokens of an answer in a chat that asks for no number.
    """

    rows: int = 8
    queue: int = 64
    cache_bytes: int = 1 << 30
    body_bytes: int = 8 << 20
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


class ModelServer:
    """A model behind OpenAI's protocol.

    Args:
        name: what clients call the model.
        api_key: clients have to send it, if given.
        local: only programs of this machine use the server, so without a key no web page may.
    """

    def __init__(
        self,
        model: Model,
        name: str,
        *,
        api_key: str | None = None,
        local: bool = False,
        limits: Limits | None = None,
    ) -> None:
        self.model, self.name, self._key, self._local = model, name, api_key, local
        self._limits = limits or Limits()
        self._bodies = Bodies(self._limits.body_bytes)
        self._large = asyncio.Semaphore(1)  # preparing one takes seconds, and much memory
        self.scheduler = Scheduler(
            model, rows=self._limits.rows, waiting=self._limits.queue, cache_bytes=self._limits.cache_bytes
        )
        self.metrics = Metrics(self.scheduler)
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
        app = Starlette(routes=routes, lifespan=lifespan, exception_handlers={HTTPException: _http_error})
        app.router.redirect_slashes = False  # a redirection would go to the host that the request names
        return app

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
        return await self._answer(request, read_completion)

    async def chat(self, request: HttpRequest) -> Response:
        """`/v1/chat/completions`."""
        return await self._answer(request, partial(read_chat, default_tokens=self._limits.chat_tokens))

    def _check_model(self, name: str) -> None:
        if name not in (self.name, self.model.name):
            raise HTTPException(404, f"this server has no model {name[:100]!r}.{did_you_mean(name, [self.name])}")

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

    async def _answer(self, request: HttpRequest, read: Callable[[dict[str, Any]], Asked]) -> Response:
        async with self._bodies.read(request) as body:
            async with self._large if len(body) > _LARGE else nullcontext():
                if len(body) > _LARGE and await request.is_disconnected():
                    raise ClientDisconnect
                job = await self._prepared(request, body, read)
            job.submit()
        if job.asked.stream:
            return _EventStream(job.events(request.is_disconnected), job.cancel)
        try:
            return Response(await job.answer(request.is_disconnected), media_type="application/json")
        finally:
            job.cancel()

    async def _prepared(self, request: HttpRequest, body: bytes, read: Callable[[dict[str, Any]], Asked]) -> Job:
        """The job of a request, made in a thread.

        Raises:
            ClientDisconnect: the client went away meanwhile.
        """
        left = threading.Event()
        made = asyncio.create_task(run_in_threadpool(self._job, body, read, left.is_set))
        while not (await asyncio.wait([made], timeout=PATIENCE))[0]:
            if await request.is_disconnected():
                left.set()
        return made.result()

    def _job(self, body: bytes, read: Callable[[dict[str, Any]], Asked], has_left: Callable[[], bool]) -> Job:
        fields = read_json(body)
        if isinstance(name := fields.get("model"), str):
            self._check_model(name)
        return Job(read(fields), self.model, self.scheduler, self.metrics, self.name, has_left)

    def _answered(
        self, handler: Callable[[HttpRequest], Awaitable[Response]], *, protected: bool = True
    ) -> Callable[[HttpRequest], Awaitable[Response]]:
        """`handler` with the key checked, errors as JSON, and the request counted."""

        async def handle(request: HttpRequest) -> Response:
            try:
                self._check_sender(request)
                if protected:
                    self._check_key(request)
                response = await handler(request)
            except ClientDisconnect:
                response = Response(status_code=499)
            except HTTPException as error:
                response = await _http_error(request, error)
            except Exception as error:
                status, body = answers.described(error, self.model.name, self.name)
                response = JSONResponse(body, status, headers={"Retry-After": "5"} if status in (429, 503) else None)
            self.metrics.requests.labels(request.scope["route"].path, response.status_code).inc()
            return response

        return handle

    def _check_sender(self, request: HttpRequest) -> None:
        """Refuse web pages of other servers, which a browser on this machine may show, where no key keeps them away."""
        if self._key is not None or not self._local:
            return
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        if host and not is_loopback(host_name(host)):
            raise HTTPException(
                403, "this server answers to localhost only; for other names, serve with --api-key, or --host ADDRESS"
            )
        if origin is not None and origin.partition("://")[2] != host:
            raise HTTPException(403, "a web page of another server asks; for those, serve with --api-key")

    def _check_key(self, request: HttpRequest) -> None:
        if self._key is None:
            return
        kind, _, key = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), self._key.encode()):
            raise HTTPException(401, "this server wants its API key: Authorization: Bearer KEY")


async def _http_error(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    detail = error.detail
    if detail == HTTPStatus.NOT_FOUND.phrase:  # Starlette's own, for a path without a route
        path = request.url.path[:100]
        detail = (
            f"this server has no path {path!r}; it answers /v1/chat/completions, /v1/completions and /v1/models, so "
            "the base URL of an OpenAI client ends in /v1"
        )
    kind = {401: "authentication_error", 404: "not_found_error"}.get(error.status_code, "invalid_request_error")
    headers = {"WWW-Authenticate": "Bearer"} if error.status_code == 401 else error.headers
    return JSONResponse(answers.error_object(detail, kind), error.status_code, headers=headers)
