"""Requests to an OpenAI-compatible server, with retries."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

import httpx2

from ...errors import ConfigError, EndpointError, did_you_mean

PAUSES = (1.0, 2.0, 4.0, 8.0)
"""Seconds before each retry of a request that got no answer, or a status 429 or 5xx."""

_TIMEOUT = httpx2.Timeout(1800, connect=10)  # seconds; reading a million tokens takes long
_SHOWN = 300  # characters of a server's message that are shown


class RefusedRequest(EndpointError):
    """An answer with status 4xx: the request is wrong, and a retry would not help.

    Attributes:
        status: HTTP status of the answer.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Server:
    """Requests to one server. If the environment has OPENAI_API_KEY, they carry it as bearer token.

    Args:
        url: the root of the API, such as http://localhost:8000/v1.

    Attributes:
        address: the URL without a password.
        host: `localhost:8000`.

    Raises:
        ConfigError: `url` is no web address.
    """

    def __init__(self, url: str) -> None:
        try:
            parsed = httpx2.URL(url.rstrip("/"))
        except httpx2.InvalidURL as error:
            raise ConfigError(
                f"endpoint {url!r} is no address ({error}); give one such as http://localhost:8000/v1"
            ) from None
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise ConfigError(f"endpoint {url!r} is no http address; give one such as http://localhost:8000/v1")
        self.address, self.host = str(parsed.copy_with(userinfo=b"")), parsed.netloc.decode()
        key = os.environ.get("OPENAI_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx2.Client(base_url=parsed, headers=headers, timeout=_TIMEOUT)

    def model(self, name: str | None) -> dict[str, Any]:
        """The server's description of the model `name`, or of its only model.

        Raises:
            ConfigError: there is no such model, or there are several and no name.
            EndpointError: as in `ask`.
        """
        listed = self.ask("/models").get("data")
        models = [model for model in listed or [] if isinstance(model, dict) and "id" in model]
        known = {str(model["id"]): model for model in models}
        if name is None and len(known) == 1:
            return next(iter(known.values()))
        if not known:
            raise EndpointError(f"{self.address}/models lists no model; wait until the server has loaded one")
        if name is None:
            raise ConfigError(f"{self.address} serves {', '.join(known)}; choose one with --served-as")
        if name not in known:
            raise ConfigError(f"{self.address} serves no model {name!r}.{did_you_mean(name, known)}")
        return known[name]

    def complete(self, model: str, ids: Sequence[int], **fields: Any) -> dict[str, Any]:
        """The greedy continuation of token ids: the first choice of the server's answer.

        Args:
            fields: fields of the request, such as `max_tokens`.

        Raises:
            EndpointError: as in `ask`, or the answer has no choice.
        """
        answer = self.ask("/completions", {"model": model, "prompt": list(ids), "temperature": 0, **fields})
        choices = answer.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise EndpointError(f"{self.address}/completions answered without choices: {str(answer)[:_SHOWN]}")
        choice: dict[str, Any] = choices[0]
        return choice

    def ask(self, path: str, payload: dict[str, Any] | None = None) -> dict[str, Any]:
        """The JSON object that the server answers to a POST of `payload`, or to a GET if there is
        no payload.

        Raises:
            RefusedRequest: the status is 4xx.
            EndpointError: there is no answer after several tries, or it cannot be read.
        """
        trouble = ""
        for pause in (0, *PAUSES):
            time.sleep(pause)
            try:
                response = self._client.request("GET" if payload is None else "POST", path, json=payload)
            except httpx2.RequestError as error:
                trouble = f"could not be reached ({str(error) or type(error).__name__})"
                continue
            if response.status_code != 429 and response.status_code < 500:
                return self._read(response, path)
            trouble = f"answered {response.status_code} ({_error_message(response)})"
        raise EndpointError(
            f"{self.address}{path} {trouble}, in {len(PAUSES) + 1} tries; check the address, and that the "
            "server runs. Finished rows are stored: the same command continues from there"
        )

    def _read(self, response: httpx2.Response, path: str) -> dict[str, Any]:
        status = response.status_code
        if status >= 300:
            hint = {401: "; set OPENAI_API_KEY to a valid key", 404: "; most addresses end in /v1"}.get(status, "")
            raise RefusedRequest(f"{self.address}{path} answered {status}: {_error_message(response)}{hint}", status)
        try:
            answer = response.json()
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise EndpointError(
                f"{self.address}{path} answered no JSON object: {response.text[:60]!r}; most addresses end in /v1"
            )
        return answer


def _error_message(response: httpx2.Response) -> str:
    """The message of an error, from the field where this server puts it."""
    try:
        body = response.json()
    except ValueError:
        body = response.text
    if isinstance(body, dict):
        error = body.get("error", body)
        body = error.get("message") or error.get("detail") or error if isinstance(error, dict) else error
    return " ".join(str(body).split())[:_SHOWN] or response.reason_phrase
