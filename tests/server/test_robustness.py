"""One request cannot disturb another: numbers at the limits, clients that leave early, and a lack of memory."""

import asyncio
import json
import threading

import httpx2
import pytest
from running import PATIENCE, TEXT, greedy, post, serving, waits
from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM

import ropewalk as rw
from ropewalk.engine.scheduler import Request, Scheduler
from ropewalk.engine.sequence import Sequence

HUGE = "1" + "0" * 400


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_comes_back_alone(served, stream):
    url, server = served
    answer = post(url, prompt=TEXT, max_tokens=0, echo=True, stream=stream)
    event = answer.text.split("\n")[0].removeprefix("data: ")
    assert json.loads(event)["choices"][0]["text"] == TEXT
    assert server.scheduler.active == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", HUGE),
        ("temperature", "1e300"),
        ("repetition_penalty", "1e-300"),
        ("repetition_penalty", HUGE),
        ("repetition_penalty", "Infinity"),
        ("max_time", HUGE),
        ("max_tokens", HUGE),
        ("n", r'"\ud800"'),
        (r"\ud800", "1"),
    ],
)
def test_numbers_and_texts_at_the_limits_are_refused(served, field, value):
    body = f'{{"prompt": "import os", "max_tokens": 4, "{field}": {value}}}'
    answer = httpx2.post(f"{served[0]}/v1/completions", content=body.encode(), timeout=PATIENCE)
    assert answer.status_code == 400
    assert field.split("_")[0] in answer.json()["error"]["message"]


def test_more_answers_than_the_server_ever_takes_are_refused(model):
    with serving(model, limits={"rows": 1, "queue": 2}) as (url, _):
        for fields in ({"prompt": TEXT, "n": 4}, {"prompt": [TEXT, TEXT], "n": 2}):
            answer = post(url, max_tokens=2, **fields)
            assert answer.status_code == 400
            assert "more than the 3 that this server takes" in answer.json()["error"]["message"]
        assert post(url, prompt=TEXT, max_tokens=2, n=3).status_code == 200


def test_the_smallest_top_p_keeps_the_likeliest_token(served, model):
    answer = post(served[0], prompt=TEXT, max_tokens=6, temperature=1, top_p=1e-300)
    assert answer.json()["choices"][0]["text"] == model.generate(TEXT, greedy(6)).text


def test_a_prompt_with_several_answers_is_counted_once(served):
    alone = post(served[0], prompt=TEXT, max_tokens=3).json()["usage"]
    several = post(served[0], prompt=TEXT, max_tokens=3, n=3).json()["usage"]
    assert several["prompt_tokens"] == alone["prompt_tokens"]
    assert several["completion_tokens"] == 3 * alone["completion_tokens"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_client_that_goes_away_before_the_first_event(model, path):
    fields = {"messages": [{"role": "user", "content": TEXT}]} if "chat" in path else {"prompt": TEXT, "echo": True}
    body = json.dumps({**fields, "max_tokens": 50_000, "stream": True}).encode()
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "method": "POST",
        "path": path,
        "query_string": b"",
        "headers": [],
    }

    async def ask(server):
        arrived = asyncio.Event()

        async def receive():
            if not arrived.is_set():
                arrived.set()
                return {"type": "http.request", "body": body, "more_body": False}
            await asyncio.sleep(PATIENCE)
            return {"type": "http.disconnect"}

        async def send(message):
            if message["type"] == "http.response.body":
                raise OSError("the client went away")

        with pytest.raises(Exception):  # noqa: B017  # Starlette's, which differs by version
            await server.app()(scope, receive, send)
        await asyncio.to_thread(waits, lambda: server.scheduler.active == 0)

    with serving(model) as (_, server):
        asyncio.run(ask(server))
        assert server.metrics.cancelled._value.get() == 1


def test_a_report_that_fails_ends_its_request_alone(model):
    scheduler = Scheduler(model)
    ended = threading.Event()
    updates = []

    def fail(_):
        raise RuntimeError("the event loop is closed")

    def listen(update):
        updates.append(update)
        if update.is_last:
            ended.set()

    def request(report, tokens):
        prompt = model.read(TEXT, "auto")
        sequence = Sequence(prompt, model.resolved(greedy(tokens)), model.vocabulary, model.stop_ids)
        return Request(sequence, model.rope_at(sequence.length), sequence.length, report)

    scheduler.submit(request(fail, 150), request(listen, 20))
    assert ended.wait(PATIENCE)
    waits(lambda: scheduler.active == 0)
    scheduler.close()
    assert "".join(update.text for update in updates) == model.generate(TEXT, greedy(20)).text


@pytest.mark.parametrize("question", ["\nThe key", "\nimport nump"])
def test_contexts_go_on_after_a_lack_of_memory(model, monkeypatch, question):
    """A step with the rows of both requests does not fit; the last one waits, and continues where it was."""
    contexts = ["The key is 4711.", "The door is green."]
    params = rw.SamplingParams(max_new_tokens=12, temperature=1, seed=4)
    expected = {"plain": model.generate(TEXT, params), "pooled": model.generate(question, params, contexts=contexts)}
    sequences = {
        "plain": Sequence(model.read(TEXT, "auto"), model.resolved(params), model.vocabulary, model.stop_ids),
        "pooled": model.over_contexts(question, contexts, "entropy", params),
    }
    step, failures, answers = model._runner.step, [], {}

    def limited(rows):
        if len(rows) > 3 and len(sequences["pooled"].tokens) in (1, 4, 5):
            failures.append(len(rows))
            raise MemoryError("cannot allocate")
        return step(rows)

    def request(name):
        def report(update):
            if update.is_last:
                answers[name] = update.completion or update.error

        sequence = sequences[name]
        return Request(sequence, model.rope_at(sequence.length), sequence.length, report)

    monkeypatch.setattr(model._runner, "step", limited)
    scheduler = Scheduler(model)
    scheduler.submit(*map(request, sequences))
    scheduler.close()
    assert failures
    assert answers == expected


def test_a_prompt_is_scored_by_a_model_with_windows(tiny_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    config = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=16,
    )
    windowed = rw.load(MistralForCausalLM(config).eval(), tokenizer=tokenizer, compile=False)
    prompt = TEXT * 20  # longer than what is read at a time
    with serving(windowed) as (url, _):
        answer = post(url, prompt=prompt, max_tokens=3, echo=True, logprobs=0).json()["choices"][0]
    expected = windowed.score_ids(windowed.read(prompt, "off").ids)
    assert answer["logprobs"]["token_logprobs"][1:-3] == pytest.approx(expected.tolist(), abs=1e-4)
    assert answer["text"] == prompt + windowed.generate(prompt, greedy(3, continuation="off")).text


def test_a_prompt_that_does_not_fit_fails_alone(model, monkeypatch):
    """The requests that wait behind it are answered."""
    forward = model._runner.forward

    def limited(ids, cache, logits_to_keep):
        if cache.length + len(ids) > 200:
            raise MemoryError("cannot allocate")
        return forward(ids, cache, logits_to_keep=logits_to_keep)

    answers = {}

    def request(index, prompt):
        def report(update):
            if update.is_last:
                answers[index] = update.completion or update.error

        sequence = Sequence(model.read(prompt, "auto"), model.resolved(greedy(5)), model.vocabulary, model.stop_ids)
        return Request(sequence, model.rope_at(None), 1000, report)

    expected = model.generate(TEXT, greedy(5))
    monkeypatch.setattr(model._runner, "forward", limited)
    scheduler = Scheduler(model)
    scheduler.submit(request(0, TEXT * 30), request(1, TEXT), request(2, TEXT * 20), request(3, TEXT))
    scheduler.close()
    assert isinstance(answers[0], rw.OutOfMemory)
    assert isinstance(answers[2], rw.OutOfMemory)
    assert answers[1] == answers[3] == expected
