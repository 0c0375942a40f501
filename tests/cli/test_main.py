"""The command line: help with examples everywhere, one clear sentence and exit code 2 for mistakes."""

import ast
import inspect
import json
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from prepared import python

import ropewalk as rw
from ropewalk import ConfigError, ContextOverflow, SamplingParams, errors, load
from ropewalk.cli.help_page import place
from ropewalk.cli.main import COMMANDS, GROUPS, cli, main, shell_message
from ropewalk.errors import Setting


def ropewalk(*arguments, **options):
    return python("-m", "ropewalk", *arguments, **options)


def test_help_lists_every_command():
    text = CliRunner().invoke(cli, ["--help"]).output
    assert all(f"  {name}" in text for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name):
    text = CliRunner().invoke(cli, [name, "--help"]).output
    assert "Examples:" in text
    assert f"ropewalk {name}" in text.partition("Examples:")[2]


def test_help_begins_with_the_five_commands_for_newcomers():
    text = CliRunner().invoke(cli, ["--help"]).output
    sections = [line for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert sections == ["Options:", *(f"{title}:" for title in GROUPS)]
    first = text.partition("First steps:\n")[2].partition("\n\n")[0]
    names = [line.split()[0] for line in first.splitlines() if line.startswith("  ") and line[2] != " "]
    assert names == ["demo", "chat", "generate", "ppl", "tune"]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_page_begins_with_one_sentence_and_has_its_options_in_the_order_of_all(name):
    command = cli.get_command(click.Context(cli), name)
    summary = command.help.partition("\n\n")[0].strip().partition(" (arXiv")[0]
    assert re.fullmatch(r"[^?]+[.?]", summary) and not re.search(r"[a-z\d)]\. [A-Z]", summary), summary
    options = [option for option in command.params if isinstance(option, click.Option)]
    assert options == sorted(options, key=place)
    for option in options:
        begins = BEGINNINGS.get(option.opts[0])
        assert begins is None or option.help.startswith(begins), (option.opts[0], option.help)


BEGINNINGS = {
    "--rope": "Scaler, such as yarn:4",
    "--lengths": "Tokens of ",
    "--text": "Text to read: kjv, shakespeare, pydoc, stdlib, code, chinese, or a file or folder.",
    "--dtype": "Number format of the ",
    "--kv-dtype": "Number format of keys and values",
    "--seed": "Seed ",
    "--out": ("Folder for the results", "Picture of "),
    "--max-minutes": ("Leave out what would not finish in this time", "End after this time"),
}
"""How the help of an option begins, whatever the command."""


def test_scalers_lists_every_method_with_its_source():
    from ropewalk.scaling import METHODS

    text = CliRunner().invoke(cli, ["scalers"]).output
    assert all(method.source in text for method in METHODS.values())
    assert "yarn:factor,beta_fast=32.0" in text


def test_show_tells_and_draws_where_it_is_asked_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = CliRunner().invoke(cli, ["show", "yarn:4"], catch_exceptions=False).output
    assert "slowest by 4" in text
    assert "32768 tokens (trained 8192)" in text
    assert text.endswith("To draw it: --out scaler.png\n") and not list(tmp_path.iterdir())
    drawn = CliRunner().invoke(cli, ["show", "yarn:4", "--out", "a.png"], catch_exceptions=False).output
    assert drawn.splitlines()[-2:] == [f"{'drawn':<20} a.png", f"{'drawn':<20} a.svg"]
    assert (tmp_path / "a.png").stat().st_size > 10_000
    assert (tmp_path / "a.svg").exists()


def test_the_cache_is_listed_and_entries_are_removed(tmp_path, monkeypatch):
    monkeypatch.setenv("ROPEWALK_CACHE", str(tmp_path))
    for name, size in (("gguf-float32-a-1", 3_000_000), ("gguf-b-2", 2_000_000), ("kernels", 10), ("tuned", 10)):
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / "deep" / "file").write_bytes(b"x" * size)

    def cache(*arguments):
        return CliRunner().invoke(cli, ["cache", *arguments])

    listed = cache().stdout
    assert listed.splitlines()[0] == "      3.0 MB  gguf-float32-a-1  (a .gguf file, converted for transformers)"
    assert listed.splitlines()[-1] == f"      5.0 MB  in {tmp_path}" and "tuned" not in listed
    assert "has no entry gguf-c*" in str(cache("--remove", "gguf-float32*", "--remove", "gguf-c*").exception)
    assert (tmp_path / "gguf-float32-a-1").exists(), "nothing is removed then"
    assert "5.0 MB  removed from" in cache("--remove", "gguf-*").stdout
    assert cache("--remove", "tuned").exception
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kernels", "tuned"]


def test_version():
    assert CliRunner().invoke(cli, ["--version"]).output.endswith(f", version {rw.__version__}\n")


def test_generate_streams_and_scores_are_repeatable(tiny_folder):
    arguments = ["generate", str(tiny_folder), "import ", "--max-new-tokens", "8", "--temperature", "1", "--seed", "3"]
    first = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert first.exit_code == 0
    assert first.output.strip()
    assert CliRunner().invoke(cli, arguments).output == first.output
    piped = CliRunner().invoke(cli, [*arguments[:2], "-", *arguments[3:]], input="import ", catch_exceptions=False)
    assert piped.output == first.output


def test_standard_input_is_text_that_may_end_inside_a_character(tiny_folder, tmp_path):
    def piped(data, *arguments):
        return CliRunner().invoke(cli, ["generate", *map(str, arguments)], input=data)

    short = ["--max-new-tokens", 4, "--temperature", 1, "--seed", 3]
    whole = piped("# A café\nimport os\n".encode(), tiny_folder, "-", *short)
    assert whole.exit_code == 0
    assert piped("# A café\r\nimport os\r\n".encode(), tiny_folder, "-", *short).output == whole.output
    cut = piped("# A café".encode()[:-1], tiny_folder, "-", *short)
    assert cut.exit_code == 0, "the model completes the character"
    none = tmp_path / "none"  # it is refused before the model is looked for
    assert "not UTF-8: byte 0xff at offset 4" in str(piped(b"abc \xff and more", none, "-").exception)
    (tmp_path / "a.txt").write_text("A text.")
    asked = piped(b"caf\xc3", none, "-", tmp_path / "a.txt", "--contexts")
    assert "ends inside a character" in str(asked.exception)


MISTAKES = {
    "unknown scaler": (["show", "yran:4"], "unknown scaler 'yran'. Did you mean 'yarn'?"),
    "factor below 1": (["show", "yarn:0.5"], "yarn: factor 0.5 must be at least 1"),
    "two on a facet": (["show", "yarn:2|ntk:2"], "'yarn' and 'ntk' both set the frequencies"),
    "bad length": (["show", "yarn:2", "--length", "8q"], "'8q' is not a length"),
    "unknown command": (["genrate"], "no command 'genrate'. Did you mean 'generate'?"),
    "unknown asset": (["fetch", "smollm"], "smollm2-135m"),
    "missing model": (["generate", "./no-such-model", "x"], "no such folder"),
    "text too short": (["ppl", "TINY", "--text", "TEXT", "--lengths", "1x,64k", "--target", "64"], "too short"),
    "missing text": (["ppl", "TINY", "--text", "no-such-text.txt"], "no-such-text.txt"),
    "bad utf-8": (["ppl", "TINY", "--text", "BAD"], "byte 0xff at offset 5"),
    "unused option": (["ppl", "TINY", "--stride", "64"], "--stride has no effect on fixed-target"),
    "bad protocol": (
        ["ppl", "TINY", "--text", "TEXT", "--protocol", "fixd-target"],
        "Did you mean 'fixed-target'?",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence_and_exit_code_2(name, tiny_folder, tmp_path, monkeypatch, capfd):
    (tmp_path / "text.txt").write_text("some words, " * 400, encoding="utf-8")
    (tmp_path / "bad.txt").write_bytes(b"hello\xff")
    files = {"TINY": tiny_folder, "TEXT": tmp_path / "text.txt", "BAD": tmp_path / "bad.txt"}
    arguments, message = MISTAKES[name]
    before = sorted(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ropewalk", *(str(files.get(a, a)) for a in arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    shown = capfd.readouterr().err
    assert stop.value.code == 2
    assert message in shown
    assert len([line for line in shown.splitlines() if line.startswith("ropewalk: ")]) <= 1
    assert sorted(tmp_path.iterdir()) == before


def in_this_process(monkeypatch, *arguments):
    """The exit code of `main`."""
    monkeypatch.setattr(sys, "argv", ["ropewalk", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ppl"], "Missing argument 'MODEL'. ("),
        (
            ["show", "yarn:4", "--lenth", "4k"],
            "No such option '--lenth'. Did you mean '--length'? (",
        ),
        (["show", "yarn"], "yarn: needs factor, as in 'yarn:4'"),
        (["show", "self-extend:8,window=10k"], "self-extend: window 10240 must be below 8192, the length"),
        (
            [
                "generate",
                str(Path(__file__).parents[1] / "data" / "tiny-llama"),
                "x",
                "--rope",
                "self-extend:8,window=10k",
            ],
            "self-extend: window 10240 must be below 256, the length",
        ),
        (["show", "yarn:4", "--out", "a.jpg"], "a.jpg is no .png; a .png and an .svg are written"),
        (["ppl", "a", "--max-minutes", "nan"], "'--max-minutes': nan is no time to measure in; give a number above 0"),
        (["demo", "--max-minutes", "0"], "'--max-minutes': 0 is no time to measure in"),
        (["demo", "--max-minutes", "-1"], "'--max-minutes': -1 is no time to measure in"),
        (["gpu-check", "--minutes", "inf"], "'--minutes': inf is no time to measure in"),
        (
            ["ppl", "a", "--no-compile", "--endpoint", "http://localhost:1", "--text", __file__],
            "--no-compile has no effect",
        ),
        (["show", "yarn:4", "--out", f"{__file__}/a.png"], f"{__file__}: File exists; check the path"),
    ],
)
def test_mistakes_of_usage_are_a_sentence_too(arguments, message, monkeypatch, capfd, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert in_this_process(monkeypatch, *arguments) == 2
    shown = capfd.readouterr().err
    assert shown.startswith("ropewalk: ") and shown.count("\n") == 1
    assert message in shown
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("command", "goes_on"), [("ppl", True), ("tune", True), ("generate", False), ("show", False)])
def test_a_stopped_command_says_whether_it_resumes(command, goes_on, monkeypatch, capfd):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.get_command(click.Context(cli), command), "invoke", stopped)
    assert in_this_process(monkeypatch, command, "a", *(["b"] if command == "generate" else [])) == 130
    rest = "; what was finished, if anything, is stored; the same command continues" if goes_on else ""
    assert capfd.readouterr().err.strip() == f"ropewalk: stopped{rest}"


def test_a_stopped_measurement_says_what_it_stored(monkeypatch, capfd):
    def stopped(*_, **__):
        raise KeyboardInterrupt("2 rows are stored in runs/a")

    monkeypatch.setattr(cli.get_command(click.Context(cli), "ppl"), "invoke", stopped)
    assert in_this_process(monkeypatch, "ppl", "a") == 130
    assert capfd.readouterr().err.strip() == "ropewalk: stopped; 2 rows are stored in runs/a"


def test_a_mistake_shows_no_traceback_in_the_shell():
    done = ropewalk("show", "yran:4")
    assert done.returncode == 2
    assert done.stderr == "ropewalk: unknown scaler 'yran'. Did you mean 'yarn'?\n"


def test_ppl_measures_reports_and_resumes(tiny_folder, tmp_path):
    (tmp_path / "text.py").write_text("def add(a, b):\n    return a + b\n\n" * 300, encoding="utf-8")
    arguments = ["ppl", tiny_folder, "--rope", "none", "--rope", "yarn:2", "--lengths", "0.5x,1x,2x"]
    arguments += ["--text", tmp_path / "text.py", "--target", "64", "--out", tmp_path / "run"]
    first = ropewalk(*arguments)
    assert first.returncode == 0, first.stderr
    run = tmp_path / "run"
    for name in ("results.jsonl", "table.md", "table.csv", "env.json", "loss.png", "loss.svg", "report.html"):
        assert (run / name).stat().st_size > 0
        assert name == "env.json" or name == "results.jsonl" or name in first.stdout.replace("\n", "")
    rows = (run / "results.jsonl").read_text(encoding="utf-8")
    assert rows.count("\n") == 6
    # a run that was killed while it wrote its last line measures that cell again, and no other
    lines = rows.splitlines(keepends=True)
    (run / "results.jsonl").write_text("".join(lines[:-1]) + lines[-1][:40], encoding="utf-8")
    assert ropewalk(*arguments).returncode == 0
    again = (run / "results.jsonl").read_text(encoding="utf-8")
    assert again.splitlines()[:5] == rows.splitlines()[:5]
    assert again.count("\n") == 6


@pytest.mark.slow
def test_ctrl_c_keeps_finished_cells_and_says_so(tiny_folder, tmp_path):
    (tmp_path / "text.py").write_text("def add(a, b):\n    return a + b\n\n" * 12000, encoding="utf-8")
    command = [sys.executable, "-m", "ropewalk", "ppl", tiny_folder, "--rope", "yarn:256", "--lengths", "64,64k"]
    command += ["--text", tmp_path / "text.py", "--target", "32", "--out", tmp_path / "run"]
    running = subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    results = tmp_path / "run" / "results.jsonl"
    while running.poll() is None and not (results.exists() and results.read_text(encoding="utf-8")):
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=600)
    assert running.returncode == 130, errors
    assert f"ropewalk: stopped; 1 finished row is stored in {tmp_path / 'run'}; the same command continues" in errors
    assert "ropewalk: stopping\n" in errors
    assert "Traceback" not in errors
    assert len(results.read_text(encoding="utf-8").splitlines()) == 1


def test_dry_run_measures_nothing(tiny_folder, tmp_path):
    (tmp_path / "text.txt").write_text("some words, " * 900, encoding="utf-8")
    done = ropewalk("ppl", tiny_folder, "--text", tmp_path / "text.txt", "--target", "32", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "4 cells" in done.stdout
    assert not (tmp_path / "runs").exists()


def test_an_error_names_the_options_of_the_command(tiny_folder, tmp_path):
    done = CliRunner().invoke(cli, ["generate", str(tiny_folder), "import os\n" * 200])
    assert re.search(r"add --rope auto, shorten the prompt, or add --max-length \d+ to go there", str(done.exception))
    words = ["generate", str(tiny_folder), "import os\n" * 200, "--rope", "self-extend:2,window=64"]
    assert "with rope 'self-extend:2,window=64'; add --rope auto" in str(CliRunner().invoke(cli, words).exception)
    (file := tmp_path / "long.txt").write_text("import os\n" * 200)
    asked = CliRunner().invoke(cli, ["generate", str(tiny_folder), "x", str(file), "--contexts"])
    assert "or split it: --window 2k" in str(asked.exception)


SETTINGS = {
    Setting("max_length", 400, "load"): ("load with max_length=400", "add --max-length 400"),
    Setting("rope", "auto", "model"): ("set model.rope = 'auto'", "add --rope auto"),
    Setting("rope", "auto"): ("rope='auto'", "--rope auto"),
    Setting("offload", "FOLDER", "load"): ("load with offload=FOLDER", "add --offload FOLDER"),
    Setting("compile", False, "load"): ("load with compile=False", "add --no-compile"),
    Setting("compile", True): ("compile=True", "--compile"),
    Setting("special_tokens", True, "load"): ("load with special_tokens=True", "add --special-tokens"),
    Setting("top_p", 2, "given"): ("top_p 2", "--top-p 2"),
    Setting("kv_dtype", form="name"): ("kv_dtype", "--kv-dtype"),
    Setting("window", "2k", python="rw.windows(text)"): ("rw.windows(text)", "--window 2k"),
}


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_a_setting_is_an_argument_in_python_and_an_option_in_the_shell(setting):
    in_python, in_shell = SETTINGS[setting]
    error = ConfigError("it is so; ", setting, ", or so")
    command = cli.get_command(None, "generate")
    assert str(error) == f"it is so; {in_python}, or so"
    assert shell_message(error.args, command) == f"it is so; {in_shell}, or so"
    assert shell_message(error.args, cli.get_command(None, "scalers")) == str(error), "it has no such option"


def test_errors_with_settings_survive_pickling():
    error = ContextOverflow("too long; ", Setting("max_length", 400, "load"))
    assert str(pickle.loads(pickle.dumps(error))) == "too long; load with max_length=400"


def test_no_error_names_a_setting_as_plain_text():
    """An argument of `load` or of SamplingParams in a message is a Setting, so that the shell can name the option."""
    names = {*inspect.signature(load).parameters, *SamplingParams.__dataclass_fields__} - {"name", "stop", "seed"}
    assignment = re.compile(rf"(?<![\w.-])({'|'.join(names)})(=| = )[\w'\"(]|model\.rope =")
    value = re.compile(rf"(^|(?<![\w.-]))({'|'.join(names - {'rope'})}) $")  # before one in an f-string
    engine = Path(errors.__file__).parent / "engine"
    plain = []
    for file in sorted(engine.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and _raises(node):
                texts = [leaf.value for leaf in ast.walk(node) if isinstance(leaf, ast.Constant)]
                plain += [
                    f"{file.name}:{node.lineno}: {t}"
                    for t in texts
                    if assignment.search(str(t)) or value.search(str(t))
                ]
    assert not plain


def _raises(call: ast.Call) -> bool:
    name = getattr(call.func, "id", "") or getattr(call.func, "attr", "")
    return name in (*errors.__all__, "warn") and name not in ("Setting", "did_you_mean", "first_line")


AS_JSON = {
    "scalers": ([], lambda shown: {"name", "fields", "facet", "summary", "source"} == set(shown[0])),
    "show": (["yarn:4"], lambda shown: shown["scaler"] == "yarn:4" and shown["drawn"] == []),
    "base": (
        ["4x", "--base", "1e4", "--trained", "512"],
        lambda shown: shown["bound"]["length"] == 2048 and shown["rules"][0]["spec"] == "base:10000",
    ),
    "explain": (["TINY"], lambda shown: shown["length"] == 256 and shown["engines"][0]["engine"] == "transformers"),
    "export": (["TINY", "OUT", "--rope", "yarn:2"], lambda shown: shown["length"] == 512 and shown["target"] == "hf"),
    "fetch": (["kjv"], lambda shown: set(shown) == {"kjv"}),
    "vocab": (["TINY", "--text", "FILE", "--cuts", "5"], lambda shown: shown["seed"] == 0),
    "ppl": (
        ["TINY", "--text", "FILE", "--lengths", "1x", "--target", "64", "--out", "OUT"],
        lambda shown: shown["rows"][0]["context"] == 256 and shown["left_out"] == [] and len(shown["verdict"]) == 1,
    ),
    "continuation": (
        ["TINY", "--text", "FILE", "--cuts", "1", "--out", "OUT"],
        lambda shown: len(shown["rows"]) > 0 and shown["folder"].endswith("out") and shown["verdict"] == [],
    ),
    "passkey": (
        ["TINY", "--lengths", "1x", "--trials", "1", "--depths", "0", "--out", "OUT"],
        lambda shown: shown["rows"][0]["task"] == "passkey" and shown["verdict"][0].startswith("passkey: "),
    ),
}


@pytest.mark.parametrize("name", AS_JSON)
def test_a_result_as_json_is_one_line_and_nothing_else(name, tiny_folder, no_plots, tmp_path, monkeypatch):
    monkeypatch.setattr("ropewalk.engine.checkpoints.assets.fetch", lambda name, **_: tmp_path / name)
    (tmp_path / "text.py").write_text("def add(a, b):\n    return a + b\n\n" * 100, encoding="utf-8")
    files = {"TINY": tiny_folder, "FILE": tmp_path / "text.py", "OUT": tmp_path / "out"}
    arguments, is_right = AS_JSON[name]
    words = [str(files.get(word, word)) for word in arguments]
    done = CliRunner().invoke(cli, [name, *words, "--json"], catch_exceptions=False)
    assert done.exit_code == 0
    assert done.stdout.count("\n") == 1
    assert is_right(json.loads(done.stdout)), done.stdout


def test_fetch_without_names_leaves_out_large_models(tmp_path, monkeypatch):
    from ropewalk.engine.checkpoints import assets

    monkeypatch.setattr(assets, "fetch", lambda name, **_: tmp_path / name)
    here = {"gemma3-270m": tmp_path / "gemma3-270m"}
    monkeypatch.setattr(assets, "cached", here.get)
    done = CliRunner().invoke(cli, ["fetch"], catch_exceptions=False)
    assert re.search(rf"^smollm2-135m +{tmp_path}/smollm2-135m$", done.stdout, re.MULTILINE)
    assert re.search(rf"^gemma3-270m +{tmp_path}/gemma3-270m$", done.stdout, re.MULTILINE)
    assert "qwen2.5-coder-0.5b not here (478 MB); ropewalk fetch qwen2.5-coder-0.5b\n" in done.stdout
    paths = json.loads(CliRunner().invoke(cli, ["fetch", "--json"], catch_exceptions=False).stdout)
    assert set(paths) == set(assets.ASSETS)
    assert paths["qwen2.5-coder-0.5b"] is None
    done = CliRunner().invoke(cli, ["fetch", "qwen2.5-coder-0.5b"], catch_exceptions=False)
    assert done.stdout == f"qwen2.5-coder-0.5b {tmp_path}/qwen2.5-coder-0.5b\n"


def test_every_command_that_prints_a_result_has_json():
    without = {
        name
        for name in COMMANDS
        if not any(option.name == "as_json" for option in cli.get_command(click.Context(cli), name).params)
    }
    assert without <= {"lm-eval", "chat", "serve", "transformers-serve"}
