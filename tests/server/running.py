"""A server in a thread of this process, for the tests."""

import socket
import threading
import time
from contextlib import contextmanager

import uvicorn

from ropewalk.server.app import Limits, ModelServer


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
