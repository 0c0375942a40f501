"""No request reads a file, reaches another host, takes the memory or holds the server."""

import json
import math
import threading
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import httpx2
import pytest
from running import PATIENCE, TEXT, greedy, post, raw, refused, serving

import ropewalk as rw
from ropewalk.engine.chat_template import _parts, _with_marks
from ropewalk.server import answers, app, bodies, connection, requests
from ropewalk.server.answers import CompletionLogprobs
from ropewalk.tokenizer_tools.characters import finished_text
from ropewalk.tokenizer_tools.stop_strings import StopStringMatcher
from ropewalk.tokenizer_tools.stream import TextStream

CHAT = "/v1/chat/completions"
DEEP = json.loads("[" * 900 + "]" * 900)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"a" * 4_000_000: 1}, "is no field of this request"),
        ({"rope": "yarn:2|" * 1000}, "rope must be a text of at most 4,096 characters"),
        ({"rope": "a" * 4000}, "unknown scaler"),
        ({"rope": "yarn:" + "a" * 4000 + "=1"}, "unknown field"),
        ({"rope": "yarn:2,2" + "a" * 4000}, "needs a field name"),
        ({"rope": "yarn:" + "a" * 4000}, "is not a number"),
        ({"rope": "yarn:2@" + "a" * 4000}, "are no layers"),
        ({"rope": "rerope:" + "a" * 4000}, "is not a length"),
        ({"rope": "/etc/passwd"}, "unknown scaler '/etc/passwd'"),
        ({"rope": "file:///etc/passwd"}, "unknown scaler 'file'"),
        ({"model": "a" * 4_000_000}, "this server has no model"),
        ({"stop": "a" * 1001}, "stop must be a text, or a list of at most 16"),
        ({"stop": ["a"] * 17}, "stop must be a text, or a list of at most 16"),
        ({"stop": DEEP}, "stop must be a text, or a list of at most 16"),
        ({"temperature": DEEP}, "temperature must be a number"),
        ({"temperature": "a" * 1_000_000}, "temperature must be a number"),
        ({"continuation": "a" * 1_000_000}, "continuation must be"),
        ({"n": DEEP}, "n must be a whole number"),
        ({"n": ["a"] * 500_000}, "n must be a whole number from 1 to 16, not a list of 500,000"),
        ({"tools": DEEP}, "tools is not supported"),
        ({"prompt": ["x"] * 200_000, "n": 16}, "3,200,000 answers at once are more than the 72"),
        ({"prompt": [[5]] * 73}, "73 answers at once"),
        ({"prompt": [10**4000]}, "token"),
        ({"contexts": ["x"] * 257}, "at most 256 together"),
        ({"contexts": ["x"] * 17, "n": 16}, "this request asks for 272"),
        ({"contexts": ["x" * (1 << 20)], "n": 9}, "8,388,608 characters"),
    ],
)
def test_large_and_nested_fields_are_refused_at_once(served, fields, message):
    assert message in refused(served[0], {"prompt": "x", "max_tokens": 2, **fields}, 404 if "model" in fields else 400)


@pytest.mark.parametrize(
    ("message", "wanted"),
    [
        ({"role": "user", "content": "a", "more": DEEP}, "more than 8"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]},
            "texts only",
        ),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://a.b/c"}}]}, "texts only"),
    ],
)
def test_messages_hold_texts_alone(served, message, wanted):
    assert wanted in refused(served[0], {"messages": [message], "max_tokens": 2}, path=CHAT)


def test_a_message_is_no_template(served, model):
    """Neither the template nor its options come from a client, and text in braces stays what it is."""
    messages = [{"role": "user", "content": "{% for i in range(10**9) %}{{ 7 * 7 }}{{ cycler.__init__ }}{% endfor %}"}]
    answer = post(served[0], CHAT, messages=messages, max_tokens=3).json()
    assert answer["choices"][0]["message"]["content"] == model.chat(messages, greedy(3)).text
    for field in ("chat_template", "chat_template_kwargs", "documents", "prompt_template"):
        fields = {"messages": messages, field: "{{ 1 }}"}
        assert f"{field!r} is no field" in refused(served[0], fields, path=CHAT)


def test_no_message_names_a_folder(tiny_folder, served, monkeypatch):
    plain = rw.load(tiny_folder, compile=True)
    assert str(tiny_folder) == plain.name
    with serving(plain) as (url, _):
        message = refused(url, {"messages": [{"role": "user", "content": "a"}]}, path=CHAT)
        assert "that tiny reaches" in refused(url, {"prompt": "x", "max_tokens": 300})
        assert "which tiny reaches" in refused(url, {"prompt": "x" * 100_000})
    assert "no chat template" in message and "/v1/completions" in message and str(tiny_folder.parent) not in message
    for path in ("/v1/models/../../etc/passwd", "/v1/models/%2e%2e%2f%2e%2e%2fetc%2fpasswd", "/..%2f..%2fetc%2fpasswd"):
        answer = raw(served[0], f"GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        assert b" 404 " in answer.split(b"\r\n")[0] and b"root:" not in answer


def test_a_prompt_with_several_answers_is_tokenized_once(served, model, monkeypatch):
    read, seen = type(model).read, []
    monkeypatch.setattr(type(model), "read", lambda self, *args, **more: seen.append(args) or read(self, *args, **more))
    assert post(served[0], prompt=TEXT, max_tokens=2, n=4).status_code == 200
    assert len(seen) == 1


def test_a_long_stop_string_is_not_copied():
    matcher = StopStringMatcher(("a" * 3_000_000,))
    tracemalloc.start()
    assert [matcher.push("ab") for _ in range(100)] == ["ab"] * 100
    assert tracemalloc.get_traced_memory()[1] < 100_000  # no copy of the string
    tracemalloc.stop()


def test_many_messages_prepare_the_names_once():
    names = [f"<|reserved_special_token_{n}|>" for n in range(250)]
    _parts.cache_clear()
    for _ in range(100):
        assert _with_marks("a", names, "\ue000") == "a"
    assert _parts.cache_info().misses == 1
    assert _with_marks("x<|res ", names, "\ue000") == "x<|res\ue000 "
    assert _with_marks(" l|>x", names, "\ue000") == " l|>x"
    assert _with_marks(" _7|>x", names, "\ue000") == " \ue000_7|>x"


def test_offsets_are_those_of_the_whole_text():
    """The cost of one does not grow with the text."""
    pieces = [
        b"a",
        "é".encode()[:1],
        "é".encode()[1:],
        b"\xff",
        "\u20ac".encode()[:2],
        b"b",
        "😀".encode()[:3],
        "😀".encode()[3:],
        b"c",
    ]
    pieces *= 4
    stream = TextStream(SimpleNamespace(tokens=pieces))
    table = CompletionLogprobs(SimpleNamespace(text=str), stream, 0)
    for token in range(len(pieces)):
        table.add(token, None, None)
    assert table.take()["text_offset"] == [len(finished_text(b"".join(pieces[:count]))) for count in range(len(pieces))]
    assert len(stream.unfinished) < 4


@pytest.mark.parametrize(
    ("fields", "scores"),
    [
        ({"prompt_logprobs": 1}, 2),
        ({"prompt_logprobs": 20, "prompt": [TEXT] * 2}, 42),
        ({"echo": True, "logprobs": 3, "n": 2}, 8),
    ],
)
def test_scores_of_prompts_have_a_limit(served, model, monkeypatch, fields, scores):
    fields = {"prompt": TEXT, "max_tokens": 1, **fields}
    tokens = len(model.vocabulary.encode(TEXT))
    monkeypatch.setattr(requests, "MOST_SCORES", scores * tokens)
    assert post(served[0], **fields).status_code == 200
    monkeypatch.setattr(requests, "MOST_SCORES", scores * tokens - 1)
    message = refused(served[0], fields)
    assert (
        f"{scores * tokens:,} log-probabilities" in message and f"the {scores * tokens - 1:,} of a request" in message
    )
    assert post(served[0], **{**fields, "echo": False, "prompt_logprobs": None}).status_code == 200  # nothing is scored


def test_limits_are_those_of_the_page():
    page = (Path(__file__).parents[2] / "docs/server.md").read_text()
    rows = [
        f"| answers to one request (`n`) | {requests.MOST_CHOICES},",
        f"of {requests.LONGEST_STOP:,} characters each | 400",
        f"| stop strings | {requests.MOST_STOPS},",
        f"| characters of `rope` | {requests.LONGEST_TEXT:,} |",
        f"| contexts times answers | {requests.MOST_CONTEXTS}, of {requests.CONTEXT_TEXT >> 20}M characters |",
        f"| log-probabilities of prompts, with their alternatives | {requests.MOST_SCORES:,} |",
        f"| nested lists and objects in a message | {requests.DEEPEST} deep |",
        f"| all bodies that are being read | {bodies.TOGETHER} times `--body-mb` |",
        f"| connections | {connection.MOST_CONNECTIONS:,} |",
        f"| header | {connection.HEADER_BYTES >> 10} KB |",
        f"less than {connection.LEAST_BYTES >> 10} KB of it in {connection.LOOK_SECONDS:.0f} s |",
    ]
    assert [row for row in rows if row not in page] == []


@pytest.mark.parametrize(("module", "slow"), [(app, "read_json"), (answers, "prompt_logprobs"), (answers, "encoded")])
def test_a_large_request_does_not_hold_the_others(model, monkeypatch, module, slow):
    """Its body is read, and its answer made, beside the server's own loop."""
    work, begun, gate = getattr(module, slow), threading.Event(), threading.Event()

    def waiting(*args):
        begun.set()
        assert gate.wait(PATIENCE)
        return work(*args)

    monkeypatch.setattr(module, slow, waiting)
    with serving(model) as (url, _):
        large = threading.Thread(
            target=post, args=(url,), kwargs={"prompt": TEXT, "max_tokens": 1, "prompt_logprobs": 1}
        )
        large.start()
        assert begun.wait(PATIENCE)
        try:
            assert httpx2.get(f"{url}/health", timeout=PATIENCE).status_code == 200
        finally:
            gate.set()
            large.join()


def test_an_answer_is_written_in_small_pieces(monkeypatch):
    rows = [{str(token): {"logprob": -1.5, "decoded_token": "é"} for token in range(3)}] * 1000
    answer = {
        "id": "a",
        "choices": [{"text": '"', "prompt_logprobs": [None, *rows], "logprobs": {"tokens": ["a"] * 999}}],
    }
    encode, largest = answers._JSON.encode, []
    pieces = SimpleNamespace(encode=lambda value: largest.append(len(encode(value))) or encode(value))
    monkeypatch.setattr(answers, "_JSON", pieces)
    assert json.loads(answers.encoded(answer)) == answer
    assert max(largest) < 200


def test_what_cannot_be_drawn_is_a_number_in_json():
    table = CompletionLogprobs(SimpleNamespace(text=str), TextStream(SimpleNamespace(tokens=[b"a"] * 4)), 1)
    table.add(1, -math.inf, {2: -0.5, 3: -math.inf})
    assert table.take()["top_logprobs"] == [{"1": -9999.0, "2": -0.5, "3": -9999.0}]


def test_a_prompt_that_leaves_too_little_says_how_many_tokens_it_may_ask_for(served):
    message = refused(served[0], {"prompt": [5] * 250, "max_tokens": 16, "rope": "none"})
    assert '; give "rope": "auto", ask for at most "max_tokens": 6, or serve' in message
