"""A server in a thread of this process, for the tests."""

import socket
import threading
import time
from contextlib import contextmanager

import httpx2
import uvicorn

import ropewalk as rw
from ropewalk.server.app import Limits, ModelServer

TEXT = "def walk(top):\n    for name in sorted(names):\n"


@contextmanager
def serving(model, **options):
    """The root URL of a server for `model`, and the server."""
    limits = Limits(**options.pop("limits", {}))
    server = ModelServer(model, "tiny", limits=limits, **options)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    http = uvicorn.Server(uvicorn.Config(server.app(), host="127.0.0.1", port=port, log_level="warning"))
    thread = threading.Thread(target=http.run)
    thread.start()
    while not http.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}", server
    finally:
        http.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


def greedy(tokens, **more):
    return rw.SamplingParams(max_new_tokens=tokens, temperature=0, **more)


def post(url, path="/v1/completions", **fields):
    return httpx2.post(url + path, json={"temperature": 0, **fields}, timeout=60)


def waits(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
