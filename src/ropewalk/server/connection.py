"""HTTP connections that no client can hold by being slow."""

from __future__ import annotations

import asyncio
import ipaddress
import re
from typing import Any, NamedTuple

from uvicorn.protocols.http.h11_impl import H11Protocol

LOOK_SECONDS = 30.0  # between two looks at a connection
LEAST_BYTES = 16 << 10  # that a client has to send or take between two looks
HEADER_BYTES = 16 << 10  # of all header fields of a request
MOST_CONNECTIONS = 1000  # the last of them gets a 503


class _State(NamedTuple):
    """What a connection has done so far."""

    cycle: Any  # the last request; None before the first
    received: int
    pauses: int
    unsent: int


class Connection(H11Protocol):
    """A connection that ends when its client neither sends a request nor takes an answer.

    uvicorn waits for both without end. Python's parser of headers is in use for its limit, which the other one lacks.
    """

    _received = _pauses = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch = self.loop.call_later(LOOK_SECONDS, self._look, self._state())

    def connection_lost(self, exc: Exception | None) -> None:
        self._watch.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._received += len(data)
        super().data_received(data)

    def pause_writing(self) -> None:
        self._pauses += 1
        super().pause_writing()

    def _state(self) -> _State:
        return _State(self.cycle, self._received, self._pauses, self.transport.get_write_buffer_size())

    def _look(self, before: _State) -> None:
        """End the connection if its client has done too little since the state `before`."""
        now = self._state()
        if now.cycle is before.cycle and self._is_stuck(before, now):
            self.transport.abort()
        else:
            self._watch = self.loop.call_later(LOOK_SECONDS, self._look, now)

    def _is_stuck(self, before: _State, now: _State) -> bool:
        is_answered = now.cycle is None or now.cycle.response_complete
        if before.unsent and now.unsent and (is_answered or self.flow.write_paused):  # so nothing was added
            return now.pauses == before.pauses and before.unsent - now.unsent < LEAST_BYTES
        if is_answered:
            return not now.unsent  # it waits for a header
        return bool(now.cycle.more_body) and now.received - before.received < LEAST_BYTES


def http_options() -> dict[str, Any]:
    """Options of uvicorn: connections with limits, and no protocol but HTTP."""
    return {
        "http": Connection,
        "ws": "none",
        "h11_max_incomplete_event_size": HEADER_BYTES,
        "limit_concurrency": MOST_CONNECTIONS,
        "timeout_graceful_shutdown": None,
    }


def is_loopback(host: str) -> bool:
    """True for an address that only this machine reaches."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def host_name(authority: str) -> str:
    """The host of a header `Host`, without its port."""
    return re.sub(r":\d{0,5}\Z", "", authority).removeprefix("[").removesuffix("]").lower()
