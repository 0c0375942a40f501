"""What a server does beside answering: keys, limits, caches, cancellation, shutting down, and many clients at once."""

import asyncio
import gc
import json
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import psutil
import pytest
from live import limit_memory
from running import PATIENCE, TEXT, connected, greedy, post, serving, waits

import ropewalk as rw


def test_health_and_metrics(served):
    url, _ = served
    assert httpx2.get(f"{url}/health").json() == {"status": "ok"}
    post(url, prompt=TEXT, max_tokens=3)
    text = httpx2.get(f"{url}/metrics").text
    assert 'ropewalk_requests_total{path="/v1/completions",status="200"}' in text
    assert "ropewalk_completion_tokens_total" in text


def test_a_key_is_asked_for(model):
    with serving(model, api_key="secret") as (url, _):
        assert httpx2.get(f"{url}/health").status_code == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic secret"}):
            refused = httpx2.get(f"{url}/v1/models", headers=headers)
            assert refused.status_code == 401
            assert refused.json()["error"]["type"] == "authentication_error"
        assert httpx2.get(f"{url}/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "no JSON"),
        (b"{", "no JSON"),
        (b"[]", "the body is [], not a JSON object"),
        (b"[0]", "the body is a list of 1, not"),
        (b"\xff", "no JSON"),
        (b"[" * 100_000, "no JSON"),
    ],
)
def test_malformed_bodies(served, body, message):
    for path in ("/v1/completions", "/v1/chat/completions"):
        answer = httpx2.post(served[0] + path, content=body)
        assert answer.status_code == 400
        assert message in answer.json()["error"]["message"]


def test_unknown_paths_and_methods(served):
    assert httpx2.get(f"{served[0]}/v1/embeddings").status_code == 404
    answer = httpx2.post(f"{served[0]}/chat/completions", json={"messages": []})  # the base URL lacks /v1
    assert answer.status_code == 404
    message = (
        "this server has no path '/chat/completions'; it answers /v1/chat/completions, /v1/completions and /v1/models, "
        "so the base URL of an OpenAI client ends in /v1"
    )
    assert answer.json()["error"]["message"] == message
    assert httpx2.get(f"{served[0]}/v1/completions").status_code == 405


def test_a_large_body_is_refused(model):
    with serving(model, limits={"body_bytes": 10_000}) as (url, _):
        assert post(url, prompt="x" * 20_000).status_code == 413
        assert post(url, prompt=TEXT, max_tokens=2).status_code == 200


def test_a_full_queue_refuses(model, monkeypatch):
    with serving(model, limits={"rows": 1, "queue": 1}) as (url, server):
        answers, gate, send = [], threading.Event(), server.scheduler._send
        monkeypatch.setattr(server.scheduler, "_send", lambda *update: gate.wait(PATIENCE) and send(*update))

        def ask():
            answers.append(post(url, prompt=TEXT, max_tokens=2).status_code)

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        waits(lambda: server.scheduler.active == 2)
        refused = post(url, prompt=TEXT, max_tokens=2)
        assert refused.status_code == 429
        assert refused.headers["Retry-After"]
        assert "--queue" in refused.json()["error"]["message"]
        gate.set()
        for thread in threads:
            thread.join()
        assert answers == [200, 200]


def test_the_next_turn_reads_only_what_is_new(model):
    with serving(model) as (url, _):
        messages = [{"role": "user", "content": TEXT * 8}]
        first = post(url, "/v1/chat/completions", messages=messages, max_tokens=5).json()
        assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        messages.append(first["choices"][0]["message"])
        messages.append({"role": "user", "content": "class A:"})
        second = post(url, "/v1/chat/completions", messages=messages, max_tokens=5).json()
        usage = second["usage"]
        assert usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"] < 30
        assert second["choices"][0]["message"]["content"] == model.chat(messages, greedy(5)).text


def test_another_scaler_takes_nothing_from_the_cache(model, tiny_folder):
    with serving(model) as (url, _):
        prompt = TEXT * 12
        post(url, prompt=prompt, max_tokens=4)
        other = post(url, prompt=prompt, max_tokens=4, rope="yarn:2").json()
        assert other["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        assert (
            other["choices"][0]["text"] == rw.load(tiny_folder, "yarn:2", compile=True).generate(prompt, greedy(4)).text
        )
        again = post(url, prompt=prompt, max_tokens=4, rope="yarn:2").json()
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 32


def test_a_small_budget_holds_few_caches(model):
    with serving(model, limits={"cache_bytes": 1}) as (url, server):
        post(url, prompt=TEXT * 8, max_tokens=4)
        waits(lambda: not server.scheduler.active)
        post(url, prompt="x", max_tokens=1)
        assert server.scheduler.store.bytes == 0


def test_a_client_that_goes_away_is_not_written_for(model):
    with serving(model) as (url, server):
        for stream in (False, True):
            body = json.dumps({"prompt": TEXT, "max_tokens": 100_000, "stream": stream, "temperature": 0})
            with connected(url) as client:
                head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n"
                client.sendall((head + body).encode())
                waits(lambda: server.scheduler.running)
            waits(lambda: server.scheduler.active == 0)
        assert server.metrics.cancelled._value.get() == 2
        assert post(url, prompt=TEXT, max_tokens=3).json()["choices"][0]["text"] == model.generate(TEXT, greedy(3)).text


def test_a_shutdown_finishes_what_runs(model, monkeypatch):
    expected, answers = model.generate(TEXT, greedy(50)).text, []
    step, begun = model._runner.step, threading.Event()
    monkeypatch.setattr(model._runner, "step", lambda rows: begun.set() or time.sleep(0.01) or step(rows))
    with serving(model) as (url, _):

        def ask():
            answers.append(post(url, prompt=TEXT, max_tokens=50).json()["choices"][0]["text"])

        thread = threading.Thread(target=ask)
        thread.start()
        assert begun.wait(PATIENCE)
    thread.join()
    assert answers == [expected]


def test_an_error_in_a_step_ends_its_requests_alone(model, monkeypatch):
    with serving(model) as (url, _):
        runner = type(model._runner)
        step = runner.step

        def fails(self, rows):
            raise ZeroDivisionError

        monkeypatch.setattr(runner, "step", fails)
        failed = post(url, prompt=TEXT, max_tokens=5)
        assert failed.status_code == 500
        assert "ZeroDivisionError" not in failed.text
        monkeypatch.setattr(runner, "step", step)
        assert post(url, prompt=TEXT, max_tokens=5).status_code == 200


@pytest.mark.slow
def test_many_clients(model):
    """100 clients at once, some of which go away or send nonsense: every answer is that of the prompt alone, and the
    memory does not grow."""
    random.seed(1)
    prompts = [TEXT[: 8 + n % 30] + "x" * (n % 7) for n in range(40)]
    expected = {prompt: model.generate(prompt, greedy(12)).text for prompt in prompts}
    process = psutil.Process()

    async def client(http, n):
        prompt = prompts[n % len(prompts)]
        await asyncio.sleep(random.random() / 2)
        kind = n % 5
        if kind == 0:
            answer = await http.post("/v1/completions", json={"prompt": prompt, "max_tokens": "many"})
            assert answer.status_code == 400
            return
        body = {"prompt": prompt, "max_tokens": 12, "temperature": 0}
        if kind == 1:
            try:
                await http.post("/v1/completions", json={**body, "max_tokens": 5000}, timeout=0.3)
            except httpx2.TimeoutException:
                return
            raise AssertionError
        if kind == 2:
            text = ""
            async with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
                async for line in answer.aiter_lines():
                    if line.startswith("data: {"):
                        text += json.loads(line[6:])["choices"][0]["text"]
        else:
            text = (await http.post("/v1/completions", json=body)).json()["choices"][0]["text"]
        assert text == expected[prompt], prompt

    async def crowd(url):
        limits = httpx2.Limits(max_connections=None)
        async with httpx2.AsyncClient(base_url=url, timeout=PATIENCE, limits=limits) as http:
            await asyncio.gather(*(client(http, n) for n in range(100)))

    with serving(model, limits={"queue": 100}) as (url, server):
        used = []
        for _ in range(3):
            asyncio.run(crowd(url))
            waits(lambda: server.scheduler.active == 0)
            gc.collect()
            used.append(process.memory_info().rss)
        assert used[2] < used[1] + (64 << 20)


def test_many_scalers_are_not_all_kept(model):
    with serving(model) as (url, _):
        for tenths in range(11, 31):
            rope = f"yarn:{tenths / 10}"
            assert post(url, prompt=TEXT, max_tokens=1, rope=rope).status_code == 200
        assert len(model._slot._prepared) == 16
        assert post(url, prompt=TEXT, max_tokens=5).json()["choices"][0]["text"] == model.generate(TEXT, greedy(5)).text


def test_only_what_never_fits_is_refused_for_its_memory(model, monkeypatch):
    """Another request holds most of the memory, and the caches of earlier ones some of it."""
    limit_memory(monkeypatch, model, 300 * model.bytes_per_token)
    with serving(model) as (url, server):
        assert post(url, prompt="import os\n" * 30, max_tokens=2).status_code == 200
        waits(lambda: server.scheduler.store.bytes)
        sent, go_on, send = [], threading.Event(), server.scheduler._send

        def stops_at_half(*update):
            sent.append(update)
            assert len(sent) < 110 or go_on.wait(PATIENCE)
            send(*update)

        monkeypatch.setattr(server.scheduler, "_send", stops_at_half)
        with ThreadPoolExecutor() as pool:
            first = pool.submit(post, url, prompt=TEXT, max_tokens=220)
            waits(lambda: len(sent) == 110)
            held = post(url, prompt=TEXT, max_tokens=400)
            assert held.status_code == 400, held.text
            assert held.json()["error"]["code"] == "context_length_exceeded"
            assert "take at most 300 tokens" in held.json()["error"]["message"]
            contexts = [TEXT * 4, TEXT * 5, TEXT * 6]
            pooled = post(url, prompt="What?", contexts=contexts, max_tokens=100)
            assert pooled.status_code == 400 and "take at most 300 tokens" in pooled.json()["error"]["message"]
            waiting = pool.submit(post, url, prompt=TEXT, max_tokens=250)
            waits(lambda: server.scheduler.active == 2)
            assert server.scheduler.running == 1
            go_on.set()
            answered = [each.result().json()["usage"]["completion_tokens"] for each in (first, waiting)]
    assert answered == [220, 250]
