"""`ropewalk generate`: where the prompt comes from, JSON, many prompts, and what is shown meanwhile."""

import json
import os
import pty
import signal
import subprocess
import sys

import click
import filelock
import pytest
from click.testing import CliRunner

import ropewalk as rw
from ropewalk.cli import waiting as waiting_module
from ropewalk.cli.main import cli
from ropewalk.cli.messages import print_json, stopping_said
from ropewalk.engine.load import _DTYPES
from ropewalk.engine.runners.choose import CACHE_DTYPES, PRECISIONS


@pytest.fixture
def generate(tiny_folder):
    """Run the command on the tiny model; the likeliest tokens, 4 of them."""

    def run(*arguments, **options):
        words = ["generate", str(tiny_folder), *map(str, arguments), "--temperature", "0", "--max-new-tokens", "4"]
        return CliRunner().invoke(cli, words, **options)

    return run


@pytest.mark.parametrize("contexts", [[], [__file__, "--contexts", "--window", "64"]])
def test_an_answer_that_the_time_ended_says_so(contexts, generate):
    assert "--max-time ended the answer" in generate("import os", *contexts, "--max-time", "1e-6").stderr
    assert "--max-time" not in generate("import os", *contexts, "--max-time", "1000").stderr


def test_the_defaults_are_those_of_sampling_params():
    command, params = cli.get_command(click.Context(cli), "generate"), rw.SamplingParams()
    defaults = {option.name: option.default for option in command.params if hasattr(params, option.name)}
    named = set(params.__dataclass_fields__)
    assert set(defaults) == named
    for name in named - {"stop"}:
        assert defaults[name] in (getattr(params, name), click.core.UNSET), name


def test_a_prompt_from_a_file_or_standard_input(generate, tmp_path):
    (file := tmp_path / "p.txt").write_text("import os\n")
    given = generate("import os\n")
    assert given.exit_code == 0 and given.output.strip()
    assert generate("--file", file).output == given.output
    assert generate("-", input="import os\n").output == given.output


def test_the_number_formats_are_those_of_load():
    command = cli.get_command(click.Context(cli), "generate")
    offered = {option.name: set(getattr(option.type, "choices", ())) for option in command.params}
    assert offered["dtype"] == {"auto", "int8", *_DTYPES}
    assert (offered["kv_dtype"], offered["precision"]) == (set(CACHE_DTYPES), set(PRECISIONS))


MISTAKES = {
    "the name of a file": (["FILE"], "is the name of a file; add --file"),
    "an empty file": (["--file", "EMPTY"], "is empty; give another one"),
    "empty standard input": (["-"], "standard input is empty; pipe a text into it"),
    "two prompts": (["x", "--file", "FILE"], "PROMPT and --file each give the prompt"),
    "no prompt": ([], "there is no prompt; give PROMPT, - for standard input, --file or --input"),
    "two words": (["x", "y"], "y is a second prompt; put prompts of several words in quotes"),
    "logprobs as text": (["x", "--logprobs", "2"], "--logprobs are part of the JSON; add --json"),
    "input alone": (["--input", "FILE"], "--input needs --output"),
    "output alone": (["x", "--output", "FILE"], "--output needs --input"),
    "no context": (["x", "gone.txt", "--contexts"], "gone.txt cannot be read as a context: No such file"),
    "latin-1 as a context": (["x", "LATIN", "--contexts"], "convert it with `iconv -f ENCODING -t UTF-8`"),
    "pooling of nothing": (["x", "--pooling", "max"], "--pooling is for the files of --contexts"),
    "special tokens of a chat": (["x", "--chat", "--special-tokens"], "are plain text; leave out --special-tokens"),
    "contexts of a chat": (["x", "FILE", "--contexts", "--chat"], "--chat takes messages; leave out --contexts"),
    "too many new tokens": (
        ["x", "--max-length", "3"],
        "1 prompt token and --max-new-tokens 4 make 5, more than the 3 that FOLDER was loaded for; "
        "ask for at most --max-new-tokens 2, or raise --max-length to 5",
    ),
    "a dtype that there is not": (["x" * 999, "--dtype", "int9"], "'int9' is not one of 'auto', 'float32'"),
    "a dtype of keys that there is not": (["x" * 999, "--kv-dtype", "float16"], "'float16' is not one of 'auto'"),
    "a number out of range": (["x", "--max-time", "-1"], "--max-time -1 must be above 0"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_name_the_next_step(name, generate, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file, data in (("FILE", b"a text"), ("EMPTY", b""), ("LATIN", b"caf\xe9 au lait")):
        (tmp_path / file).write_bytes(data)
    arguments, message = MISTAKES[name]
    done = generate(*arguments, input="")
    assert done.exit_code
    assert message in (done.output + str(done.exception)).replace(str(tiny_folder), "FOLDER")


def test_a_prompt_that_is_too_long_is_refused_before_the_weights_are_read(generate, monkeypatch):
    monkeypatch.setattr("ropewalk.cli.generate.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    refused = str(generate("import os\n" * 200).exception)
    assert "600 prompt tokens and --max-new-tokens 4 make 604, more than the 256" in refused
    assert refused.endswith("add --rope auto, shorten the prompt, or add --max-length 604 to go there anyway")
    for limit, tokens in (("300", 300), ("0.5x", 128)):
        assert f"more than the {tokens}" in str(generate("import os\n" * 200, "--max-length", limit).exception)


def test_json_has_the_answer_and_the_log_probabilities(generate, tiny_folder):
    shown = json.loads(generate("import os\n", "--json", "--logprobs", "2").stdout)
    params = rw.SamplingParams(temperature=0, max_new_tokens=4, logprobs=2)
    answer = rw.load(tiny_folder).generate("import os\n", params)
    assert (shown["text"], shown["finish_reason"], shown["rope"]) == (answer.text, "length", "none")
    assert (shown["prompt_tokens"], shown["completion_tokens"]) == (answer.usage.prompt_tokens, 4)
    assert [token["id"] for token in shown["logprobs"]] == answer.token_ids
    assert "".join(token["token"] for token in shown["logprobs"]) == answer.text
    assert shown["logprobs"][0]["logprob"] == pytest.approx(answer.logprobs[0].logprob)
    assert len(shown["logprobs"][0]["top"]) == 2


def test_json_over_contexts_counts_the_tokens_of_each_source(generate, tmp_path):
    (file := tmp_path / "a.txt").write_text("import os\nimport sys\n")
    shown = json.loads(generate("import", file, "--contexts", "--json", "--rope", "auto").stdout)
    assert shown["sources"] == {str(file): shown["completion_tokens"]}
    assert shown["rope"] == "none"


@pytest.fixture
def batch(generate, tmp_path):
    """Answer `tmp_path/in.jsonl`; returns the result and the lines of the output."""

    def run(*arguments):
        done = generate("--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl", *arguments)
        return done, [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]

    return run


def test_many_prompts_are_answered_once_and_errors_again(generate, batch, tmp_path):
    records = [{"prompt": "import os\n", "id": "a"}, {"prompt": "def "}, {"text": "x"}, {"prompt": "x\n" * 400}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + "no json\n")
    first, lines = batch()
    assert first.exit_code == 1
    assert "3 of 5 have an error" in first.stderr
    by_id = {line["id"]: line for line in lines}
    assert set(by_id) == {"a", 2, 3, 4, 5}
    alone = json.loads(generate("import os\n", "--json").stdout)
    assert {name: by_id["a"][name] for name in alone if name != "model"} == {
        name: value for name, value in alone.items() if name != "model"
    }
    assert "no field prompt that is a string; it has 'text'" in by_id[3]["error"]
    assert "add --rope auto" in by_id[4]["error"]
    assert "line 5 is not JSON" in by_id[5]["error"]
    assert f"instead of an answer; the first: {by_id[3]['error']}" in first.stderr

    (tmp_path / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records[:2]))
    again, same = batch()
    assert again.exit_code == 0 and same == lines
    assert "2 of 2 are in" in again.stderr


def test_an_answer_is_not_taken_for_that_to_another_prompt(batch, tmp_path):
    """Lines without ids are named by their numbers, which a line put before them moves."""
    (tmp_path / "in.jsonl").write_text('{"prompt": "import os"}\n{"prompt": "def "}\n')
    _, lines = batch()
    (tmp_path / "in.jsonl").write_text('{"prompt": "class"}\n{"prompt": "import os"}\n{"prompt": "def "}\n')
    refused, same = batch()
    assert "has an answer 1 to another prompt than this input has" in str(refused.exception)
    assert same == lines
    (tmp_path / "out.jsonl").write_text(
        "".join(json.dumps({k: v for k, v in line.items() if k != "prompt_sha256"}) + "\n" for line in lines)
    )
    assert "has lines without prompt_sha256; name another" in str(batch()[0].exception)


def test_answers_of_other_weights_are_not_mixed(batch, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "import os"}\n')
    _, (line,) = batch()
    (tmp_path / "out.jsonl").write_text(json.dumps(line | {"weights": "0" * 16}) + "\n")
    for new in ("", '{"prompt": "def "}\n'):
        (tmp_path / "in.jsonl").write_text('{"prompt": "import os"}\n' + new)
        refused, lines = batch()
        assert "has answers under weights 0000000000000000, and this run has" in str(refused.exception)
        assert "already" not in refused.stderr and len(lines) == 1


def test_answers_under_auto_say_which_scaler_wrote_each(batch, tmp_path):
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": "x\n" * 200}) + '\n{"prompt": "def "}\n')
    _, lines = batch("--rope", "auto")
    assert {line["id"]: line["scaler"] for line in lines} == {1: "self-extend:8,window=128", 2: "none"}
    assert batch("--rope", "auto")[0].exit_code == 0


def test_two_runs_do_not_write_the_same_file(batch, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "import os"}\n')
    (tmp_path / "out.jsonl").touch()
    with filelock.FileLock(tmp_path / ".out.jsonl.lock"):
        refused, lines = batch()
    assert lines == []
    assert f"another run is writing {tmp_path / 'out.jsonl'}; wait for it, or name another" in str(refused.exception)
    assert len(batch()[1]) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_only_the_first_of_several_processes_writes(batch, tmp_path, monkeypatch):
    (tmp_path / "in.jsonl").write_text('{"prompt": "import os"}\n')
    monkeypatch.setenv("RANK", "1")
    with filelock.FileLock(tmp_path / ".out.jsonl.lock"):  # of the first one
        done, lines = batch()
    assert done.exit_code == 0 and lines == []


def test_an_output_that_cannot_be_written_is_named(generate, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "import os"}\n')
    refused = generate("--input", tmp_path / "in.jsonl", "--output", tmp_path / "in.jsonl" / "out.jsonl")
    assert "out.jsonl cannot be written: " in str(refused.exception)


def test_an_unfinished_line_is_answered_again_and_other_settings_are_refused(batch, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "import os"}\n{"prompt": "def "}\n')
    _, lines = batch()
    text = (tmp_path / "out.jsonl").read_text()
    (tmp_path / "out.jsonl").write_text(text[:-10])
    again, repaired = batch()
    assert "the last line of" in again.stderr and "1 of 2 are in" in again.stderr
    assert repaired == lines
    assert "has answers under special_tokens False, and this" in str(batch("--special-tokens")[0].exception)
    assert "has answers under chat None, and this run has" in str(batch("--chat")[0].exception)
    assert "has answers under rope none, and this run has yarn:2" in str(batch("--rope", "yarn:2")[0].exception)
    (tmp_path / "in.jsonl").write_text('{"prompt": "a", "id": 1}\n{"prompt": "b", "id": 1}\n')
    assert "line 2: the id 1 is that of an earlier line too" in str(batch()[0].exception)


@pytest.mark.parametrize("text", ["notes", '{"prompt": "a"}', '{"ID": 3'])
def test_a_file_of_something_else_is_not_cut(generate, batch, tmp_path, text):
    """A file without a newline is all an unfinished line."""
    (tmp_path / "in.jsonl").write_text('{"prompt": "import os"}\n')
    (tmp_path / "out.jsonl").write_text(text)
    done = generate("--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    assert "is not the beginning of an answer; name another --output" in str(done.exception)
    assert (tmp_path / "out.jsonl").read_text() == text


def test_prompts_are_not_overwritten_by_their_answers(generate, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"id": 1, "prompt": "import os"}')
    (tmp_path / "link").symlink_to(tmp_path / "in.jsonl")
    done = generate("--input", tmp_path / "in.jsonl", "--output", tmp_path / "link")
    assert "name another --output" in done.output
    assert (tmp_path / "in.jsonl").read_text() == '{"id": 1, "prompt": "import os"}'


def test_answers_under_other_settings_are_not_mixed(generate, batch, tmp_path):
    """Also where the difference is known only when the model is loaded. What has no answer yet hinders nothing."""
    (tmp_path / "in.jsonl").write_text('{"prompt": "import os"}\n{"text": "no prompt"}\n')
    _, (failed, line) = batch()
    assert line["dtype"] == failed["dtype"] == "float32"
    assert line["sampling"] == {"temperature": 0, "max_new_tokens": 4}
    unfinished = (tmp_path / "out.jsonl").read_text() + '{"id": 3'
    (tmp_path / "out.jsonl").write_text(unfinished)
    others = {
        ("--dtype", "int8"): "under dtype float32, and this run has int8",
        ("--kv-dtype", "bfloat16"): "under dtype float32, and this run has float32, bfloat16 cache",
        ("--repetition-penalty", "1.5"): "'max_new_tokens': 4}, and this run has {'temperature': 0.0, 'max_new_tokens'",
        ("--stop", "x"): "under sampling {'temperature': 0.0, 'max_new_tokens': 4}, and this run has",
    }
    files = "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl"
    for options, message in others.items():
        assert message in str(generate(*files, *options).exception)
    assert (tmp_path / "out.jsonl").read_text() == unfinished
    (tmp_path / "out.jsonl").write_text(json.dumps(failed) + "\n")
    _, lines = batch("--rope", "auto", "--max-length", "600")
    assert [line["id"] for line in lines if "error" not in line] == [1]
    assert lines[-1]["chosen"].startswith("up to")
    tuned = json.dumps(lines[-1] | {"id": 7} | {"chosen": "yarn:2"}) + "\n"
    (tmp_path / "out.jsonl").write_text(tuned)
    assert "under chosen yarn:2, and this run has up to" in str(batch("--rope", "auto")[0].exception)
    (tmp_path / "out.jsonl").write_text('{"id": 1, "prompt": "import os"}\n')
    assert "has lines without model; name another --output" in str(batch()[0].exception)


def test_an_id_with_half_a_surrogate_pair_comes_back(generate, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"id": "a\\ud800", "prompt": "import os"}\n')
    files = "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl"
    assert generate(*files, "--max-new-tokens", "1").exit_code == 0
    assert json.loads((tmp_path / "out.jsonl").read_text())["id"] == "a\ud800"
    assert "1 of 1 are in" in generate(*files, "--max-new-tokens", "1").stderr


def test_json_on_the_screen_escapes_half_a_surrogate_pair(capsys):
    print_json({"folder": os.fsdecode(b"tiny\xff"), "text": "é"})
    assert capsys.readouterr().out == '{"folder": "tiny\\udcff", "text": "é"}\n'


def test_ctrl_c_keeps_complete_answers_and_says_so(generate, tmp_path, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("ropewalk.cli.batch._answer", stopped)
    (tmp_path / "in.jsonl").write_text('{"prompt": "import os"}\n')
    done = generate("--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl", standalone_mode=False)
    assert isinstance(done.exception, click.Abort)
    assert str(done.exception) == (
        f"; complete answers are in {tmp_path / 'out.jsonl'}, run the same command again to continue"
    )


def test_stopping_is_said_while_nothing_of_python_runs(capfd, request):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with pytest.raises(KeyboardInterrupt), stopping_said():
        os.kill(os.getpid(), signal.SIGINT)
    assert capfd.readouterr().err == "\nropewalk: stopping\n"
    with stopping_said():
        pass
    assert capfd.readouterr().err == ""


WAIT = """
import sys, time
from ropewalk.cli import waiting
waiting._PATIENCE = float(sys.argv[1])
with waiting.waiting("reading [b]", 2000) as advance:
    for _ in range(4):
        advance(500)
        time.sleep(0.1)
print("done")
"""


def in_a_terminal(*arguments):
    """What a Python program writes to standard error where that is a terminal, and to standard output."""
    master, slave = pty.openpty()
    command = [sys.executable, "-c", *arguments]
    done = subprocess.run(command, stderr=slave, capture_output=False, stdout=subprocess.PIPE, text=True, check=True)
    os.close(slave)
    shown = b""
    while True:
        try:
            part = os.read(master, 4096)
        except OSError:
            break
        if not part:
            break
        shown += part
    os.close(master)
    return shown.decode(), done.stdout


def test_waiting_is_shown_in_a_terminal_after_a_second():
    shown, output = in_a_terminal(WAIT, "0.05")
    assert "reading [b]" in shown and "of 2,000 tokens" in shown
    assert output == "done\n"
    shown, output = in_a_terminal(WAIT, "30")
    assert shown == "" and output == "done\n"


def test_waiting_shows_nothing_on_a_pipe(capsys):
    waiting_module._PATIENCE, before = 0.0, waiting_module._PATIENCE
    try:
        with waiting_module.waiting("loading") as advance:
            advance(1)
    finally:
        waiting_module._PATIENCE = before
    assert capsys.readouterr().err == ""
