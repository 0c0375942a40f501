"""The bodies of requests, which share a number of bytes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.exceptions import HTTPException
from starlette.requests import Request

TOGETHER = 4  # largest bodies that all requests in preparation hold together


class Bodies:
    """Reads bodies, and counts the bytes of those in use.

    Args:
        most: bytes of one body.
    """

    def __init__(self, most: int) -> None:
        self._most, self._held = most, 0

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """The body of a request. Its bytes count until the block ends.

        Raises:
            HTTPException: 413 if it is too large, and 429 if the bodies of all requests together are.
        """
        body = bytearray()
        try:
            async for part in request.stream():
                body += part
                self._held += len(part)
                if len(body) > self._most:
                    raise HTTPException(413, f"the body has more than the {self._most:,} bytes that this server takes")
                if self._held > TOGETHER * self._most:
                    raise HTTPException(
                        429,
                        f"the requests that are being read have more than the {TOGETHER * self._most:,} bytes that "
                        "this server takes together; try again later, or serve with a larger --body-mb",
                        {"Retry-After": "5"},
                    )
            yield bytes(body)
        finally:
            self._held -= len(body)
