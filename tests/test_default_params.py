"""What a request leaves to the model: one rule in Python, the shell, batches of prompts and the server."""

import json
import shutil

import pytest
from click.testing import CliRunner
from transformers import GenerationConfig

import ropewalk as rw
from ropewalk.cli.main import cli
from ropewalk.engine.sampling import ResolvedParams, resolved

TEMPLATE = "{% for m in messages %}{{ m.role + '\n' + m.content + '\n' }}{% endfor %}assistant\n"
HOT = {"do_sample": True, "temperature": 3.0, "top_k": 40, "repetition_penalty": 1.5}
"""Far from the likeliest tokens, and from temperature 1."""
SAME = {"temperature": 3.0, "top_k": 40, "repetition_penalty": 1.5}
PROMPT = "import os\n\n\ndef walk(top):\n"
LENGTH = 12


def drawn(**settings):
    """How tokens are drawn: temperature, top-k, top-p, min-p, repetition penalty."""
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    params = ResolvedParams(**settings)
    return tuple(getattr(params, name) for name in names)


RULES = {
    "nothing": ({}, {}, {"temperature": 0}),
    "not to sample": ({"do_sample": False, "temperature": 0.6, "top_k": 9}, {}, {"temperature": 0}),
    "a penalty alone": ({"repetition_penalty": 1.1}, {}, {"temperature": 0, "repetition_penalty": 1.1}),
    "to sample": ({"do_sample": True}, {}, {"temperature": 1}),
    "all": ({**HOT, "min_p": 0.1, "top_p": 0.9}, {}, {**SAME, "min_p": 0.1, "top_p": 0.9}),
    "all, and a temperature is given": (HOT, {"temperature": 1}, {"temperature": 1}),
    "all, and greedy is given": (HOT, {"temperature": 0}, {"temperature": 0}),
    "all, and top_p is given": (HOT, {"top_p": 0.9}, {"top_p": 0.9}),
    "nothing, and top_k is given": ({}, {"top_k": 5}, {"top_k": 5}),
    "nothing, and min_p is given": ({}, {"min_p": 0.5}, {"min_p": 0.5}),
    "all, and a penalty is given": (HOT, {"repetition_penalty": 1}, {**SAME, "repetition_penalty": 1}),
}


@pytest.mark.parametrize("name", RULES)
def test_the_model_decides_what_a_request_leaves_open(name):
    recommended, given, expected = RULES[name]
    params = resolved(rw.SamplingParams(max_new_tokens=7, seed=3, **given), GenerationConfig(**recommended))
    assert drawn(**{name: getattr(params, name) for name in SAME | {"top_p": 1, "min_p": 0}}) == drawn(**expected)
    assert (params.max_new_tokens, params.seed) == (7, 3)


def test_a_model_without_a_generation_config_takes_the_likeliest_token():
    assert resolved(rw.SamplingParams(), None) == ResolvedParams(temperature=0)


@pytest.fixture(scope="module")
def folder(tiny_folder, tmp_path_factory):
    """The tiny model as a chat model that recommends to sample."""
    path = tmp_path_factory.mktemp("hot") / "tiny"
    shutil.copytree(tiny_folder, path)
    config = json.loads((path / "generation_config.json").read_text())
    (path / "generation_config.json").write_text(json.dumps(config | HOT))
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


@pytest.fixture(scope="module")
def model(folder):
    return rw.load(folder, max_length=512)


def in_a_session(model, **settings):
    with model.session() as session:
        return session.generate(PROMPT, **settings).text


def in_a_chat_session(model, **settings):
    with model.chat_session() as session:
        return session.ask(PROMPT, **settings).text


DOORS = {
    "generate": lambda model, **settings: model.generate(PROMPT, **settings).text,
    "a list": lambda model, **settings: [each.text for each in model.generate([PROMPT, "class A"], **settings)],
    "stream": lambda model, **settings: "".join(model.stream(PROMPT, **settings)),
    "contexts": lambda model, **settings: model.generate(PROMPT, contexts=["import sys", "x = 1"], **settings).text,
    "token ids": lambda model, **settings: model.generate_ids([5, 6, 7], rw.SamplingParams(**settings)).text,
    "chat": lambda model, **settings: model.chat([{"role": "user", "content": PROMPT}], **settings).text,
    "stream_chat": lambda model, **settings: "".join(
        model.stream_chat([{"role": "user", "content": PROMPT}], **settings)
    ),
    "session": in_a_session,
    "chat_session": in_a_chat_session,
    "heal": lambda model, **settings: rw.heal(
        model.hf, model.tokenizer, "import nump", rw.SamplingParams(**settings)
    ).input_ids.tolist(),
}


@pytest.mark.parametrize("door", DOORS)
def test_every_call_draws_as_the_model_recommends(door, model):
    ask, common = DOORS[door], {"max_new_tokens": LENGTH}
    answers = [ask(model, **common, seed=seed) for seed in range(4)]
    assert answers == [ask(model, **common, seed=seed, **SAME) for seed in range(4)]
    assert answers != [ask(model, **common, seed=seed, temperature=1) for seed in range(4)]
    assert ask(model, **common, temperature=0) not in answers


def test_the_model_says_how_it_answers(model, tiny_folder):
    assert model.default_params == ResolvedParams(**SAME)
    assert "answers  drawn at temperature 3, top_k 40, repetition_penalty 1.5, unless" in model.describe()
    greedy = rw.load(tiny_folder)
    assert greedy.default_params == ResolvedParams(temperature=0)
    assert "answers  the likeliest token, unless a request says how to draw" in str(greedy)
    assert greedy.generate(PROMPT, max_new_tokens=LENGTH) == greedy.generate(
        PROMPT, max_new_tokens=LENGTH, temperature=0
    )


def test_a_recommendation_that_is_not_valid_is_an_error_where_it_is_needed(tiny_folder):
    model = rw.load(tiny_folder)
    model.hf.generation_config.update(do_sample=True, top_p=0.0)
    with pytest.raises(
        rw.ConfigError, match=r"config is wrong: top_p 0 must be above 0.*say how to draw: temperature=0"
    ):
        model.generate(PROMPT, max_new_tokens=2)
    assert "config is wrong: top_p 0" in model.describe()
    assert model.generate(PROMPT, max_new_tokens=2, temperature=1).token_ids


def run(*arguments, **options):
    return CliRunner().invoke(cli, [*map(str, arguments), "--max-new-tokens", str(LENGTH)], **options)


@pytest.fixture
def ways(folder, tmp_path):
    """The commands that answer, by name: each gives its answer under some options."""

    def batch(*options):
        (source := tmp_path / "in.jsonl").write_text(json.dumps({"prompt": PROMPT}) + "\n")
        (target := tmp_path / "out.jsonl").unlink(missing_ok=True)
        assert run("generate", folder, "--input", source, "--output", target, *options).exit_code == 0
        return json.loads(target.read_text())["text"]

    return {
        "generate": lambda *options: run("generate", folder, PROMPT, *options).stdout,
        "generate --chat": lambda *options: run("generate", folder, PROMPT, "--chat", *options).stdout,
        "generate --input": batch,
        "chat": lambda *options: run("chat", folder, *options, input="import os\n").stdout,
    }


@pytest.mark.parametrize("way", ["generate", "generate --chat", "generate --input", "chat"])
def test_commands_follow_the_same_rule(way, ways):
    asked = ways[way]
    explicit = [word for name, value in SAME.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    answer = asked("--seed", "3")
    assert answer == asked("--seed", "3", *explicit)
    assert answer not in (asked("--temperature", "0"), asked("--temperature", "1", "--seed", "3"))


def test_a_request_to_the_server_follows_the_same_rule(model):
    pytest.importorskip("starlette")
    from starlette.testclient import TestClient

    from ropewalk.server.app import ModelServer

    with TestClient(ModelServer(model, "tiny").app()) as client:

        def asked(path, **fields):
            body = {"max_tokens": LENGTH, **fields}
            body |= {"messages": [{"role": "user", "content": PROMPT}]} if "chat" in path else {"prompt": PROMPT}
            choice = client.post(path, json=body).json()["choices"][0]
            return choice["message"]["content"] if "chat" in path else choice["text"]

        for path in ("/v1/completions", "/v1/chat/completions"):
            answer = asked(path, seed=3)
            assert answer == asked(path, seed=3, **SAME)
            assert answer not in (asked(path, temperature=0), asked(path, temperature=1, seed=3))


def test_options_that_would_change_nothing_are_told(tiny_folder, folder):
    for option, value in (("--top-p", "0.5"), ("--top-k", "3"), ("--min-p", "0.1"), ("--seed", "1")):
        refused = run("generate", "nowhere", "x", "--temperature", "0", option, value)
        assert refused.exit_code == 2
        assert f"--temperature 0 takes the likeliest token; leave out {option}" in refused.stderr
    for command in (("generate", tiny_folder, "x"), ("generate", tiny_folder, "x", "--json")):
        assert "takes the likeliest token; for --seed, add --temperature 1" in run(*command, "--seed", "3").stderr
    assert "--seed" not in run("generate", folder, "x", "--seed", "3").stderr
