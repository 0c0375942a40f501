"""A server in a thread of this process, for the tests."""

import json
import socket
import threading
import time
from contextlib import contextmanager

import httpx2
import uvicorn

import ropewalk as rw
from ropewalk.server.app import Limits, ModelServer
from ropewalk.server.connection import http_options

TEXT = "def walk(top):\n    for name in sorted(names):\n"
PATIENCE = 300.0  # seconds; what takes longer never comes


@contextmanager
def serving(model, **options):
    """The root URL of a server for `model`, and the server."""
    limits = Limits(**options.pop("limits", {}))
    server = ModelServer(model, "tiny", limits=limits, **options)
    with listening(server.app()) as url:
        yield url, server


@contextmanager
def listening(app):
    """The root URL of an ASGI application."""
    listener = socket.create_server(("127.0.0.1", 0))
    http = uvicorn.Server(uvicorn.Config(app, log_level="warning", **http_options()))
    thread = threading.Thread(target=http.run, args=([listener],))
    thread.start()
    while not http.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        http.should_exit = True
        thread.join(PATIENCE)
        assert not thread.is_alive()


def greedy(tokens, **more):
    return rw.SamplingParams(max_new_tokens=tokens, temperature=0, **more)


def post(url, path="/v1/completions", **fields):
    return httpx2.post(url + path, json={"temperature": 0, **fields}, timeout=PATIENCE)


def refused(url, fields, status=400, path="/v1/completions"):
    """The message of a refusal, which is short."""
    answer = httpx2.post(url + path, content=json.dumps(fields).encode(), timeout=PATIENCE)
    assert answer.status_code == status, answer.text[:300]
    assert len(answer.content) < 5000
    return answer.json()["error"]["message"]


def raw(url, text):
    """All that a server answers to the bytes of `text`."""
    with connected(url) as client:
        client.sendall(text.encode())
        return b"".join(iter(lambda: client.recv(65536), b""))


@contextmanager
def connected(url):
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), PATIENCE) as client:
        yield client


def waits(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
