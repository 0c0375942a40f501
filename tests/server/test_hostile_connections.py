"""No client holds the server by being slow, and no web page reaches it."""

import asyncio
import contextlib
import json
import logging
import threading
import time

import pytest
from running import PATIENCE, TEXT, connected, listening, post, raw, refused, serving, waits
from starlette.testclient import TestClient

from ropewalk.server import app, connection, job


def test_headers_have_a_limit(served):
    line = "X-A: " + "a" * 8000 + "\r\n"
    head = "GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
    assert b" 200 " in raw(served[0], head + line + "\r\n")
    with contextlib.suppress(ConnectionError):
        assert b" 200 " not in raw(served[0], head + line * 1000 + "\r\n")


def test_no_redirection_to_a_host_that_the_client_names(served):
    answer = raw(served[0], "GET /health/ HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n")
    assert b" 404 " in answer.split(b"\r\n")[0]
    assert b"evil" not in answer


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:8000"}, 200),
        ({"Host": "[::1]:8000"}, 200),
        ({"Host": "LOCALHOST", "Origin": "http://other"}, 403),
        ({"Host": "localhost:80", "Origin": "http://localhost:80"}, 200),
        ({"Host": "evil.example:8000"}, 403),  # a name that its owner lets point to this machine
        ({"Host": "evil.example", "Origin": "http://evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": "localhost:80", "Origin": "https://evil.example"}, 403),
        ({"Host": "localhost:80", "Origin": "null"}, 403),
        ({"Host": "[::1"}, 403),
        ({"Host": "]:x:["}, 403),
    ],
)
def test_web_pages_do_not_reach_a_local_server_without_a_key(model, headers, status):
    local = app.ModelServer(model, "tiny", local=True)
    keyed = app.ModelServer(model, "tiny", local=True, api_key="secret")
    public = app.ModelServer(model, "tiny")
    with TestClient(local.app(), base_url="http://127.0.0.1") as client:
        assert client.get("/v1/models", headers=headers).status_code == status
        assert (
            client.post("/v1/completions", headers=headers, json={"prompt": "x", "max_tokens": 1}).status_code == status
        )
    with TestClient(keyed.app()) as client:
        assert client.get("/v1/models", headers={**headers, "Authorization": "Bearer secret"}).status_code == 200
    with TestClient(public.app()) as client:
        assert client.get("/v1/models", headers=headers).status_code == 200


def test_wrong_keys(model):
    keys = ["", "Bearer", "Bearer ", "Bearer \xfc", "Bearer secre", "Bearer secret2", "Bearer " + "a" * 9000]
    with serving(model, api_key="secret") as (url, _):
        for key in keys:
            head = f"GET /metrics HTTP/1.1\r\nHost: a\r\nConnection: close\r\nAuthorization: {key}\r\n\r\n"
            assert b" 401 " in raw(url, head).split(b"\r\n")[0], key


def test_a_request_without_the_key_is_not_read(model):
    """The answer comes before the body."""
    with serving(model, api_key="secret") as (url, server):
        head = "POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000000\r\n\r\n"
        with connected(url) as client:
            client.sendall(head.encode())
            assert b" 401 " in client.recv(65536)
        assert server._bodies._held == 0


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(connection, "LOOK_SECONDS", 0.3)


@pytest.mark.parametrize(
    "sent",
    [
        "",
        "POST /v1/comp",
        "POST /v1/completions HTTP/1.1\r\nHost: a\r\nX-A: a",
        "POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 9000\r\n\r\n{",
    ],
)
def test_a_client_that_sends_slowly_is_left(model, impatient, sent):
    with serving(model) as (url, server), connected(url) as client:
        client.sendall(sent.encode())
        with pytest.raises(ConnectionError):
            for _ in range(100):  # a byte now and then does not help
                time.sleep(0.1)
                client.sendall(b"a")
                client.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    if client.recv(65536) == b"":
                        raise ConnectionResetError
                client.setblocking(True)
        waits(lambda: server._bodies._held == 0)
        assert post(url, prompt=TEXT, max_tokens=2).status_code == 200


@pytest.mark.parametrize("parts", [1, 1000])
def test_a_client_that_does_not_read_is_left(impatient, monkeypatch, parts):
    """Its answer is larger than what the system holds for it; nothing of it stays."""
    ended, lost, lose = threading.Event(), threading.Event(), connection.Connection.connection_lost
    monkeypatch.setattr(connection.Connection, "connection_lost", lambda *args: lose(*args) or lost.set())

    async def app(scope, receive, send):
        try:
            await answer(send, parts)
        finally:
            ended.set()

    with listening(app) as url, connected(url) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert ended.wait(PATIENCE) and lost.wait(PATIENCE)
        received = 0
        with contextlib.suppress(ConnectionError):
            while part := client.recv(1 << 20):
                received += len(part)
    assert 0 < received < ANSWER


@pytest.mark.parametrize("parts", [1, 100])
def test_a_client_that_reads_slowly_gets_its_answer(impatient, parts):
    async def app(scope, receive, send):
        await answer(send, parts, pause=0.01)

    with listening(app) as url, connected(url) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        received = 0
        while part := client.recv(100_000):
            received += len(part)
            time.sleep(0.005)
    assert received > ANSWER


ANSWER = 16_000_000


async def answer(send, parts, pause=0):
    """`ANSWER` bytes."""
    head = [(b"content-length", str(ANSWER).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": head})
    for part in range(parts):
        await send({"type": "http.response.body", "body": b"a" * (ANSWER // parts), "more_body": part < parts - 1})
        await asyncio.sleep(pause)


def test_connections_have_a_limit(model, monkeypatch):
    monkeypatch.setattr(connection, "MOST_CONNECTIONS", 5)
    with serving(model) as (url, _):
        health = "GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
        with contextlib.ExitStack() as stack:
            held = [stack.enter_context(connected(url)) for _ in range(4)]
            for client in held:  # an answer shows that the server has the connection
                client.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
                assert b" 200 " in client.recv(65536)
            assert b" 503 " in raw(url, health).split(b"\r\n")[0]
        waits(lambda: b" 200 " in raw(url, health).split(b"\r\n")[0])


def test_bodies_together_have_a_limit(model):
    with serving(model, limits={"body_bytes": 100_000}) as (url, server), contextlib.ExitStack() as stack:
        head = "POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n"
        for _ in range(4):
            stack.enter_context(connected(url)).sendall(head.encode() + b" " * 99_000)
        waits(lambda: server._bodies._held >= 4 * 99_000 - 10)
        assert "takes together" in refused(url, {"prompt": "x" * 50_000}, 429)
        assert post(url, prompt=TEXT, max_tokens=2).status_code == 200
    assert server._bodies._held == 0


def test_large_requests_leave_small_ones_their_turn(model, monkeypatch):
    """More large requests than there are threads; none of them is read while the first is."""
    monkeypatch.setattr(app, "_LARGE", 1000)
    at_once, most, gate = [0], [0], threading.Event()
    make = app.Job

    def slow(asked, *rest):
        if len(asked.prompts[0]) > 1000:
            at_once[0] += 1
            most[0] = max(most[0], at_once[0])
            gate.wait(PATIENCE)
            at_once[0] -= 1
        return make(asked, *rest)

    monkeypatch.setattr(app, "Job", slow)
    with serving(model) as (url, _):
        threads = [
            threading.Thread(target=post, args=(url,), kwargs={"prompt": "x" * 2000, "max_tokens": 1})
            for _ in range(45)
        ]
        for thread in threads:
            thread.start()
        waits(lambda: at_once[0])
        assert post(url, prompt=TEXT, max_tokens=2).status_code == 200
        gate.set()
        for thread in threads:
            thread.join()
    assert most[0] == 1


def test_prompts_of_a_client_that_went_away_are_not_tokenized(model, monkeypatch):
    """The client leaves while the first of three is."""
    read, seen, begun, left = type(model).read, [], threading.Event(), threading.Event()
    until_left = job._until_left

    def slow(self, prompt, *args, **more):
        seen.append(prompt)
        begun.set()
        assert left.wait(PATIENCE)
        return read(self, prompt, *args, **more)

    def watched(prompts, has_left):
        threading.Thread(target=lambda: waits(has_left) or left.set()).start()
        return until_left(prompts, has_left)

    monkeypatch.setattr(type(model), "read", slow)
    monkeypatch.setattr(job, "_until_left", watched)
    with serving(model) as (url, server):
        body = json.dumps({"prompt": ["a", "b", "c"], "max_tokens": 2}).encode()
        with connected(url) as client:
            client.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
            )
            assert begun.wait(PATIENCE)
        count = server.metrics.requests.labels("/v1/completions", 499)._value.get
        waits(lambda: count() == 1)
    assert seen == ["a"]


def test_logs_have_one_line_for_a_request(model, caplog):
    log = logging.getLogger("uvicorn.access")
    with serving(model) as (url, _):
        log.addHandler(caplog.handler)
        log.setLevel("INFO")
        target = "/a%0d%0aINFO:%20forged%1b[2J?b%0a"
        raw(url, f"GET {target} HTTP/1.1\r\nHost: a\r\nX-Forwarded-For: a%0ab\r\nConnection: close\r\n\r\n")
        refused(url, {"prompt": "x", "rope": "a\nINFO: forged\x1b[2J"})
    log.removeHandler(caplog.handler)
    lines = [record.getMessage() for record in caplog.records]
    assert any("forged" in line for line in lines)
    assert not [line for line in lines if "\n" in line or "\x1b" in line]
