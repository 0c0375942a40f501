"""What clients send to the server, and the files of prompts that `ropewalk generate --input` reads."""

from __future__ import annotations

import asyncio
import functools
import io
from contextlib import redirect_stderr
from typing import Any

import click
import httpx2
from hypothesis import strategies as st
from inputs import deep, json_mutants, mutants, text, written
from parser import TINY, WORK, Parser, stored

import ropewalk as rw
from ropewalk.cli.batch import Chat, answer_all
from ropewalk.server.app import Limits, ModelServer

_MESSAGES = [{"role": "system", "content": "Be short."}, {"role": "user", "content": [{"type": "text", "text": "a"}]}]
_COMPLETIONS: list[Any] = [
    {
        "prompt": "import ", "max_tokens": 2, "temperature": 0.5, "seed": 1, "top_p": 0.9, "logprobs": 2, "n": 2,
        "stop": ["\n"], "rope": "yarn:2", "user": "a", "continuation": "exact",
    },
    {"prompt": [[1, 2], [3]], "max_tokens": 1, "echo": True, "logprobs": 1, "model": "tiny"},
    {"prompt": "x", "max_tokens": 2, "stream": True, "stream_options": {"include_usage": True}, "prompt_logprobs": 1},
    {"prompt": "x", "max_tokens": 1, "contexts": ["a", "b"], "max_time": 5},
]  # fmt: skip
_CHATS: list[Any] = [
    {"messages": _MESSAGES, "max_tokens": 2, "logprobs": True, "top_logprobs": 2, "stop": "a", "top_k": 3},
    {"messages": _MESSAGES, "max_completion_tokens": 2, "stream": True, "response_format": {"type": "text"}},
]
_LINES: list[Any] = [{"id": "a", "prompt": "import "}, {"id": 7, "messages": _MESSAGES}, {"prompt": "x"}]


@functools.cache
def _model() -> rw.Model:
    model = rw.load(TINY, max_length=96, compile=True)
    model.tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}a{% endif %}"
    )
    return model


@functools.cache
def _client() -> tuple[httpx2.AsyncClient, asyncio.AbstractEventLoop]:
    app = ModelServer(_model(), "tiny", limits=Limits(body_bytes=1 << 16)).app()
    transport = httpx2.ASGITransport(app, raise_app_exceptions=True)
    return httpx2.AsyncClient(transport=transport, base_url="http://x"), asyncio.new_event_loop()


def _bodies(samples: list[Any]) -> st.SearchStrategy[bytes]:
    _model()  # loading counts for no input
    prompts = text().map(lambda prompt: written({**samples[0], next(iter(samples[0])): prompt}))
    return json_mutants(*samples).map(written) | mutants(*map(written, samples)) | prompts | st.sampled_from(deep())


def _ask(path: str, body: bytes) -> None:
    client, loop = _client()
    answer = loop.run_until_complete(client.post(path, content=body))
    if answer.status_code in (400, 404, 413):  # 404: another model
        raise rw.RopewalkError(answer.json()["error"]["message"])
    assert answer.status_code == 200, (answer.status_code, answer.text[:200])


def _files() -> st.SearchStrategy[bytes]:
    _model()
    changed = st.lists(json_mutants(*_LINES).map(written), min_size=1, max_size=3).map(b"\n".join)
    return changed | mutants(b"\n".join(map(written, _LINES))) | st.binary(max_size=60) | st.sampled_from(deep())


def _batch(value: bytes) -> None:
    """A line that cannot be answered is written with its reason, and the command then ends with 1."""
    target = WORK / "answers.jsonl"
    target.unlink(missing_ok=True)
    params = rw.SamplingParams(max_new_tokens=1, temperature=0)
    with click.Context(click.Command("generate")), redirect_stderr(io.StringIO()):
        try:
            answer_all(stored("prompts.jsonl", value), target, {}, Chat(), params, _model)
        except click.exceptions.Exit as ended:
            assert ended.exit_code == 1
            raise rw.RopewalkError(target.read_text(encoding="utf-8")) from None


REQUESTS: dict[str, Parser] = {
    "completion request": Parser(
        functools.partial(_bodies, _COMPLETIONS), functools.partial(_ask, "/v1/completions"), 20
    ),
    "chat request": Parser(functools.partial(_bodies, _CHATS), functools.partial(_ask, "/v1/chat/completions"), 20),
    "file of prompts": Parser(_files, _batch, 20),
}
