"""`ropewalk transformers-serve`: OpenAI's client against the running server of transformers."""

from __future__ import annotations

import importlib.util
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from click.testing import CliRunner

import ropewalk as rw
from ropewalk.cli.main import cli

SPEC = "self-extend:8,window=64|logn"
TEXTS = ["import os\n", "def add(a, b):\n    return a + b\n" * 25, "class Stack:\n    def push(self, item):\n" * 40]
NEW = 8


@pytest.fixture(scope="module")
def folder(tiny_folder, tmp_path_factory):
    return rw.export(tiny_folder, tmp_path_factory.mktemp("named") / "mapped", rope=SPEC).path


@pytest.mark.skipif(importlib.util.find_spec("fastapi") is None, reason="needs transformers[serving]")
def test_clients_get_the_texts_of_the_patched_model(folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    command = [sys.executable, "-m", "ropewalk", "transformers-serve", str(folder), "--continuous-batching"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--cb-num-blocks", "40", "--cb-max-batch-tokens", "256"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)

    def completion(text: str) -> str:
        return client.completions.create(model=str(folder), prompt=text, max_tokens=NEW, temperature=0).choices[0].text

    try:
        deadline = time.monotonic() + 600
        while True:
            try:
                completion("a")
                break
            except openai.APIConnectionError:
                assert server.poll() is None and time.monotonic() < deadline
                time.sleep(0.1)
        with ThreadPoolExecutor() as together:
            answers = list(together.map(completion, TEXTS))
    finally:
        server.kill()
    log = server.communicate()[1]
    model = rw.load(folder, dtype="float32", compile=False)
    params = rw.SamplingParams(max_new_tokens=NEW, temperature=0, continuation="off")
    assert answers == [model.generate(text, params).text for text in TEXTS]
    assert SPEC in log


def test_folders_without_a_name_are_refused(tiny_folder, tmp_path):
    with pytest.raises(rw.AssetError, match=r"this folder has no config\.json"):
        CliRunner().invoke(cli, ["transformers-serve", str(tmp_path)], catch_exceptions=False)
    with pytest.raises(rw.ConfigError, match="names no scaler, so `transformers serve` reads it without ropewalk"):
        CliRunner().invoke(cli, ["transformers-serve", str(tiny_folder)], catch_exceptions=False)


def test_commands_take_the_scaler_of_the_folder_by_default(folder):
    def generate(*options: str) -> str:
        command = ["generate", str(folder), TEXTS[2], "--max-new-tokens", "2", "--temperature", "0", *options]
        return CliRunner().invoke(cli, command, catch_exceptions=False).stdout

    assert generate() == generate("--rope", SPEC) != ""
    with pytest.raises(rw.ContextOverflow):  # the model was trained at 256 tokens
        generate("--rope", "none")
