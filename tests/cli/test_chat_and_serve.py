"""`ropewalk chat`, `generate --chat` and `ropewalk serve`, on the tiny model with a chat template."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import click
import pytest
from click.testing import CliRunner

import ropewalk as rw
from ropewalk.cli import chat as chat_module
from ropewalk.cli.main import cli

TEMPLATE = (
    "{% for m in messages %}{{ m.role + '\n' + m.content + '<|endoftext|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
)
GREEDY = ("--temperature", "0", "--max-new-tokens", "6")


@pytest.fixture(scope="module")
def folder(tiny_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("chat") / "tiny"
    shutil.copytree(tiny_folder, path)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return str(path)


@pytest.fixture(scope="module")
def model(folder):
    return rw.load(folder)


def run(*arguments, lines=()):
    return CliRunner().invoke(cli, arguments, input="".join(f"{line}\n" for line in lines), catch_exceptions=False)


def said(*texts, system=None):
    start = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return start + [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]


def answer(model, messages):
    return model.chat(messages, temperature=0, max_new_tokens=6).text


def test_lines_of_a_pipe_are_messages(folder, model, tmp_path):
    first = answer(model, said("import os", system="Be brief."))
    second = answer(model, said("import os", first, "class A:", system="Be brief."))
    stored = tmp_path / "talk"
    done = run("chat", folder, "--system", "Be brief.", *GREEDY, lines=["import os", "", f"/save {stored}", "class A:"])
    assert done.stdout == f"{first}\n{second}\n"
    done = run("chat", folder, "--load", str(stored), *GREEDY, lines=["class A:", "/reset", "import os"])
    assert done.stdout == f"{second}\n{first}\n"


def test_commands(folder, model, tmp_path):
    (tmp_path / "text.txt").write_text("import os")
    lines = [
        "/rope yarn:2",
        f"/file {tmp_path / 'text.txt'}",
        "/info",
        "/help",
        "/exit",
        "never read",
    ]
    done = run("chat", folder, *GREEDY, lines=lines)
    assert done.stdout == rw.load(folder, "yarn:2").chat(said("import os"), temperature=0, max_new_tokens=6).text + "\n"
    for text in ("rope yarn:2", "tokens", "/save PATH"):
        assert text in done.stderr


WRONG = [
    ("/rope yarm:2", "Did you mean 'yarn'"),
    ("/load /nowhere", "/nowhere"),
    ("/file /nowhere", "/nowhere"),
    ("/ropes", "Did you mean '/rope'"),
    ("/rope", "/rope needs a scaler"),
]


@pytest.mark.parametrize(("line", "message"), WRONG)
def test_a_wrong_command_in_a_pipe_ends_the_chat(folder, line, message):
    """What follows would be answered under another scaler, or without the conversation, than was asked for."""
    with pytest.raises(rw.RopewalkError, match=message):
        run("chat", folder, *GREEDY, lines=[line, "import os"])


def test_a_wrong_command_in_a_terminal_is_told_and_the_chat_goes_on(terminal, model, capsys):
    messages = terminal(*(line for line, _ in WRONG), "import os")
    assert [message["content"] for message in messages] == ["import os", answer(model, said("import os"))]
    shown = capsys.readouterr().err
    assert all(message in shown for _, message in WRONG)


def test_a_message_in_a_pipe_that_cannot_be_answered_is_an_error(folder):
    with pytest.raises(rw.ContextOverflow):
        run("chat", folder, "--max-length", "300", lines=["x " * 3000, "import os"])


def test_reset_forgets_what_was_read(folder):
    assert "read     0 tokens" in run("chat", folder, *GREEDY, lines=["import os", "/reset", "/info"]).stderr


def test_generate_with_the_template(folder, model):
    done = run("generate", folder, "import os", "--chat", "--system", "Be brief.", *GREEDY)
    assert done.stdout == answer(model, said("import os", system="Be brief.")) + "\n"


def test_many_chats(folder, model, tmp_path):
    first = {"role": "user", "content": "import os"}
    own = [{"role": "system", "content": "Be long."}, first]
    records = [{"prompt": "import os"}, {"id": "a", "messages": [first]}, {"messages": own}, {"messages": []}]
    records += [{"prompt": "x", "messages": [first]}, {"messages": ["x"]}, {"text": "x"}]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))

    def lines(*arguments):
        target.unlink(missing_ok=True)
        run("generate", folder, "--input", str(source), "--output", str(target), *arguments, *GREEDY)
        return {line["id"]: line for line in map(json.loads, target.read_text().splitlines())}

    answered = lines("--chat", "--system", "Be brief.")
    expected = answer(model, said("import os", system="Be brief."))
    assert answered[1]["text"] == answered["a"]["text"] == expected
    assert answered[1]["chat"] == {"system": "Be brief."}
    assert "has a system message of its own; leave out --system" in answered[3]["error"]
    assert "has an empty list of messages" in answered[4]["error"]
    assert "has a prompt and messages" in answered[5]["error"]
    assert "messages[1] must be a dict" in answered[6]["error"]
    assert "no field prompt that is a string, and no list of messages; it has 'text'" in answered[7]["error"]
    assert lines("--chat")[3]["text"] == answer(model, own)
    plain = lines()
    assert plain[1]["text"] == model.generate("import os", temperature=0, max_new_tokens=6).text
    assert "it has 'id', 'messages'; add --chat" in plain["a"]["error"]


@pytest.fixture
def terminal(model, monkeypatch):
    """Runs a chat in a terminal, in which these lines are typed; an exception is raised in place of a line."""

    def run(*lines):
        rest = iter([*lines, "/exit"])
        monkeypatch.setattr("builtins.input", lambda _: next(rest))
        with click.Context(cli.get_command(click.Context(cli), "chat")), model.chat_session() as session:
            terminal = chat_module._Terminal(model, session, rw.SamplingParams(temperature=0, max_new_tokens=6))
            terminal._interactive = True
            terminal.run()
            return session.messages

    return run


def test_a_terminal_shows_mistakes_in_terms_of_options(terminal, capsys):
    terminal("x " * 3000)
    shown = capsys.readouterr().err
    assert "--max-new-tokens" in shown and "add --max-length" in shown
    assert "load with" not in shown


@pytest.mark.parametrize("when", ["read", "check_length", "running"])
def test_ctrl_c_before_an_answer_begins_does_not_end_the_chat(terminal, model, monkeypatch, when):
    """The messages before it stay."""
    count, usual = 0, getattr(type(model), when)

    def stopped(*args, **options):
        nonlocal count
        if (count := count + 1) == 1:
            raise KeyboardInterrupt
        return usual(*args, **options)

    monkeypatch.setattr(type(model), when, stopped)
    messages = terminal("def", "import os")
    assert [message["content"] for message in messages] == ["import os", answer(model, said("import os"))]


def test_a_stored_chat_has_its_own_system_message(folder, tmp_path):
    (tmp_path / "talk").touch()
    with pytest.raises(click.UsageError, match="--load has its own system message; leave out --system"):
        CliRunner().invoke(
            cli,
            ["chat", folder, "--load", str(tmp_path / "talk"), "--system", "x"],
            catch_exceptions=False,
            standalone_mode=False,
        )


def test_options_without_effect_are_refused(folder, monkeypatch):
    monkeypatch.setattr("uvicorn.run", lambda *_, **__: None)
    refusals = {
        ("chat", "--tp-plan", "auto"): "a conversation runs in one process; leave out --tp-plan",
        ("serve", "--tp-plan", "auto"): "a server runs in one process; leave out --tp-plan",
        ("serve", "--api-key", ""): "--api-key is empty; give a key",
        ("serve", "--no-compile", "--cache-mb", "100"): "only caches of the compiled kernels are kept; leave out",
    }
    for (command, *options), message in refusals.items():
        done = CliRunner().invoke(cli, [command, folder, *options])
        assert done.exit_code == 2 and message in done.stderr


def test_a_question_without_the_template_is_told_of_it(folder, tiny_folder):
    assert "try --chat" in run("generate", folder, "What is os?", *GREEDY).stderr
    assert "--chat" not in run("generate", folder, "import os", *GREEDY).stderr
    assert "--chat" not in run("generate", str(tiny_folder), "What is os?", *GREEDY).stderr


@pytest.mark.parametrize("prompt", [["import os"], ["--input", "in.jsonl", "--output", "out.jsonl"]])
def test_a_model_without_a_template_is_no_chat_model(prompt, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_text('{"prompt": "import os"}\n')
    with pytest.raises(rw.ConfigError, match=r"no chat template, so it is not a chat model; leave out --chat$"):
        run("generate", str(tiny_folder), *prompt, "--chat", *GREEDY)


def test_a_chat_with_a_model_without_a_template_is_refused_before_it_begins(tiny_folder):
    with pytest.raises(rw.ConfigError, match=r"no chat template.*; to continue a text, use ropewalk generate$"):
        run("chat", str(tiny_folder))


@pytest.mark.parametrize("host", ["127.0.0.1", "192.0.2.1", "no such host"])
def test_an_address_that_cannot_be_used_is_refused_before_the_model_is_loaded(tmp_path, host):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        words = ["serve", str(tmp_path / "no-model"), "--host", host, "--port", str(taken.getsockname()[1])]
        asked = CliRunner().invoke(cli, words)
    assert isinstance(asked.exception, rw.ConfigError)
    assert str(asked.exception).startswith(f"cannot listen on {host}, port ")
    assert str(asked.exception).endswith("; name another --port or --host")


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_server_answers_and_ends_when_it_is_asked_to(folder, model):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    command = [sys.executable, "-m", "ropewalk", "serve", folder, "--port", str(port), "--name", "tiny"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 600
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline
                time.sleep(0.1)
        body = {"model": "tiny", "messages": said("import os"), "temperature": 0, "max_tokens": 6}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        reply = json.load(urllib.request.urlopen(request, timeout=600))
        assert reply["choices"][0]["message"]["content"] == answer(model, said("import os"))
        server.send_signal(signal.SIGINT)
        log = server.communicate(timeout=600)[1]
    finally:
        server.kill()
    assert server.returncode in (0, 130), log
    assert "rope" in log and "Traceback" not in log


@pytest.mark.parametrize("command", ["chat", "serve"])
def test_a_limit_may_be_a_multiple_of_the_trained_length(command, folder, monkeypatch):
    limits = []

    def load(*_, max_length, **__):
        limits.append(max_length)
        raise rw.ConfigError("enough is known")

    monkeypatch.setattr(f"ropewalk.cli.{command}.load_model", load)
    for limit in ("0.5x", "300"):
        CliRunner().invoke(cli, [command, folder, "--max-length", limit])
    assert limits == [128, 300]
