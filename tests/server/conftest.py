"""One server for all tests that leave it as it was."""

import pytest
from running import serving

import ropewalk as rw

openai = pytest.importorskip("openai")

CHATML = (
    "{% for message in messages %}{{ message['role'] + '\n' + message['content'] + '<|endoftext|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def model(tiny_folder):
    model = rw.load(tiny_folder, rope="auto", compile=True)
    model.tokenizer.chat_template = CHATML
    return model


@pytest.fixture(scope="session")
def served(model):
    with serving(model) as (url, server):
        yield url, server


@pytest.fixture(scope="session")
def client(served):
    return openai.OpenAI(base_url=f"{served[0]}/v1", api_key="none", max_retries=0)
