"""The pages: code blocks run or are commands that exist, links lead somewhere, every page is on the site."""

import ast
import functools
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tomllib
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from unittest import SkipTest

import click
import pytest
from click.testing import CliRunner
from markdown_it import MarkdownIt
from sybil import Document
from sybil.parsers.markdown import CodeBlockParser, SkipParser

from ropewalk.cli.main import COMMANDS, cli
from ropewalk.evals.tuning import rounds
from ropewalk.scaling import parse

ROOT = Path(__file__).resolve().parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = {path.relative_to(ROOT).as_posix(): path for path in [*sorted(ROOT.glob("*.md")), *DOCS]}
TINY = ROOT / "tests" / "data" / "tiny-llama"

STANDS_FOR = {
    "smollm2-135m": str(TINY),
    "path/or/hub-id": str(TINY),
    "./my-model": str(TINY),
    "MODEL": str(TINY),
    '"shakespeare"': '"book.txt"',
    '["1k"]': '["1x"]',
}
"""What the tests put in the place of things that are too large for them."""

RUN = ("scalers", "explain", "export")
"""Commands that take no time on the small model: they are run, the others held against their options."""

LANGUAGES = {"python", "sh", "text", "toml"}

RECORD = """
record() { printf '%s\\0' "$@" >&3; printf '\\n\\0' >&3; }
ropewalk() { record ropewalk "$@"; }
python() { record python "$@"; }
python3() { record python "$@"; }
source() { :; }
pip() { record pip "$@"; }
make() { record make "$@"; }
torchrun() { record launch "$@"; }
accelerate() { record launch "$@"; }
cat() { :; }
tail() { :; }
command_not_found_handle() { record "$@"; }
set -uf
"""
"""Shell functions that write down what a block would run, its quotes and variables resolved."""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the blocks run: empty but for a text. Searches have few scalers to try."""
    monkeypatch.setattr(rounds, "starting_points", lambda *_: [parse("yarn:2"), parse("rerope:64")])
    monkeypatch.setattr(rounds, "neighbours", lambda _: [])
    (tmp_path / "book.txt").write_text("It was a bright cold day in April, and the clocks were striking. " * 300)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def replaced(text):
    for name, other in STANDS_FOR.items():
        text = text.replace(name, other)
    return text


def run_python(example):
    source = "\n" * (example.line + example.parsed.line_offset) + replaced(example.parsed)
    exec(compile(source, example.path, "exec", dont_inherit=True), example.namespace)


def run_shell(example, runs=RUN):
    """Take the commands of a block apart as bash does, and check each; those named in `runs` are run."""
    code = f"exec 3>commands\n{RECORD}{example.parsed}"
    bash = shutil.which("bash")
    done = subprocess.run([bash, "-c", code], env={"PATH": "/nowhere"}, capture_output=True, text=True, check=False)
    assert not done.stderr, done.stderr
    words = Path("commands").read_text().split("\0")[:-1]
    commands, command = [], []
    for word in words:
        if word == "\n":
            commands.append(command)
            command = []
        else:
            command.append(word)
    assert commands, "a block of no commands"
    for name, *arguments in commands:
        CHECKS.get(name, unknown)(arguments, runs)


def unknown(arguments, runs):
    raise AssertionError(f"a command that no test knows: {arguments}")


def check_ropewalk(arguments, runs):
    parent = click.Context(cli, info_name="ropewalk", **cli.context_settings)
    if arguments == ["--version"]:
        return
    name, command, rest = cli.resolve_command(parent, arguments)
    for argument in rest:
        if argument.startswith("runs/"):  # some commands refuse folders that are not there
            Path(argument).mkdir(parents=True, exist_ok=True)
        if argument.endswith((".txt", ".jsonl")):
            Path(argument).touch()
    command.make_context(name, list(rest), parent=parent)
    for option, value in pairwise(rest):
        if option == "--rope" and not value.isupper():
            parse(value, 8192)
    if name == "show":
        parse(rest[0], 8192)
    if name in runs and not any(argument.endswith(".gguf") for argument in rest):
        output = run_command(cli, arguments)
        if "oracle" in arguments:
            assert set(re.findall(r"(\d+)% of \d", output)) == {"100"}, output


def run_command(command, arguments, name="ropewalk"):
    arguments = [replaced(argument) for argument in arguments]
    done = CliRunner().invoke(command, arguments, prog_name=name, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def check_python(arguments, runs):
    if arguments[:2] == ["-m", "ropewalk"]:
        check_ropewalk(arguments[2:], runs)
        return
    if arguments[0] == "-m":
        found = importlib.util.find_spec(arguments[1])
        assert found, arguments
        source = Path(found.origin)
    else:
        source = ROOT / arguments[0]
    for option in (argument for argument in arguments if argument.startswith("--")):
        assert f'"{option}"' in source.read_text(encoding="utf-8"), (option, source)


def check_pip(arguments, runs):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert arguments[0] == "install"
    for argument in arguments:
        if found := re.fullmatch(r"(?:ropewalk|\.)\[(.+)\]", argument):
            assert set(found[1].split(",")) <= extras.keys(), argument
        if argument.endswith(".txt"):
            assert (ROOT / argument).is_file(), argument


def check_make(arguments, runs):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for argument in arguments:
        name = argument.partition("=")[0]
        assert re.search(rf"^{name}:|\$\({name}\)", makefile, re.MULTILINE), argument


def check_launch(arguments, runs):
    at = arguments.index("-m")
    check_python(arguments[at:], runs)


def check_vllm(arguments, runs):
    """A folder that a line before wrote is served; an override names a scaler."""
    action, folder, *rest = arguments
    assert action == "serve" and Path(folder, "config.json").is_file(), arguments
    for option, value in pairwise(rest):
        if option == "--hf-overrides":
            parse(json.loads(value)["ropewalk_scaler"], 8192)


CHECKS = {
    "vllm": check_vllm,
    "ropewalk": check_ropewalk,
    "python": check_python,
    "pip": check_pip,
    "make": check_make,
    "launch": check_launch,
}


def files_of(page):
    """The files that a page has in its blocks, each with its name in the first line."""
    blocks = [token.content for token in markdown(page) if token.type == "fence"]
    return {found[1]: block for block in blocks if (found := re.match(r"# (\w+\.(?:py|toml))\n", block))}


@pytest.mark.parametrize("page", PAGES)
def test_every_code_block_runs(page, folder, capsys, installed):
    """A page that holds the files of a package is followed to the letter, with that package installed."""
    files, runs = files_of(page), RUN
    if files:
        installed(files)
        runs = {*COMMANDS} - {"show"}  # which takes seconds to draw
    parsers = [
        SkipParser(),
        CodeBlockParser("python", run_python),
        CodeBlockParser("sh", functools.partial(run_shell, runs=runs)),
    ]
    for example in Document.parse(str(PAGES[page]), *parsers):
        try:
            example.evaluate()
        except SkipTest:
            continue
        except click.ClickException as error:
            raise AssertionError(f"{page}, line {example.line}: {error.format_message()}") from None


@pytest.mark.model
def test_the_first_block_of_the_readme_prints_what_stands_below_it(capsys):
    blocks = [token for token in markdown("README.md") if token.type == "fence"]
    code, shown = blocks[:2]
    assert (code.info, shown.info) == ("python", "text")
    exec(compile(code.content, "README.md", "exec", dont_inherit=True), {})
    assert capsys.readouterr().out == shown.content


@pytest.mark.parametrize("page", PAGES)
def test_every_code_block_says_what_it_is(page):
    for token in markdown(page):
        if token.type == "fence":
            assert token.info in LANGUAGES, f"{page}, line {token.map[0] + 1}: {token.info!r}"
        if token.type == "html_block" and "skip:" in token.content:
            assert re.search(r'skip: next "\w.*"', token.content), f"{page}: {token.content} gives no reason"


@pytest.mark.parametrize("page", PAGES)
def test_commands_within_a_line_exist(page):
    for token in inline(page):
        words = token.content.split()
        if token.type == "code_inline" and words[:1] == ["ropewalk"] and len(words) > 1:
            names = [word for word in words[1:] if word in COMMANDS]
            assert words[1] in COMMANDS or words[1].startswith("-"), token.content
            known = {"--help"} | {
                option for name in names for p in cli.get_command(None, name).params for option in p.opts
            }
            for word in words:
                if word.startswith("--") and words[1] in COMMANDS:
                    assert word.partition("=")[0] in known, token.content


@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_of_a_command_are_right(name, folder):
    for line in (cli.get_command(None, name).epilog or "").splitlines():
        if "ropewalk " in line:
            words = line[line.index("ropewalk ") :]
            run_shell(SimpleNamespace(parsed=words))


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    here = PAGES[page]
    for token in inline(page):
        target = token.attrGet("href") or token.attrGet("src")
        if target is None or re.match(r"(https?|mailto):", str(target)):
            continue
        path, _, anchor = str(target).partition("#")
        there = (here.parent / path).resolve() if path else here
        assert there.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors(there), f"{page}: {target}"


def test_every_page_is_on_the_site():
    def files(entries):
        for value in (value for entry in entries for value in entry.values()):
            yield from [value] if isinstance(value, str) else files(value)

    site = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]
    assert sorted(files(site["nav"])) == [path.name for path in DOCS]


PLACES = re.findall(r"^\| (.+?) \| `(\S+\.py)` \| (.+?) \|$", PAGES["docs/design.md"].read_text(encoding="utf-8"), re.M)
"""The table of docs/design.md: what, the file with it, and its names there."""


@pytest.mark.parametrize(("file", "names"), [row[1:] for row in PLACES], ids=[row[0] for row in PLACES])
def test_what_the_design_page_locates_is_there(file, names):
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    defined = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    for name in re.findall(r"`([\w.]+)`", names):
        first, _, method = name.partition(".")
        assert first in defined, f"{file} defines no {first}"
        assert not method or method in {getattr(node, "name", None) for node in defined[first].body}, f"no {name}"


def test_the_design_page_locates_what_a_newcomer_asks_for():
    assert len(PLACES) >= 20


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("zensical", reason="needs ropewalk[docs]")
    for name in ("docs", "src"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "zensical.toml", tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "How to choose tokens" in (tmp_path / "site" / "api" / "index.html").read_text(encoding="utf-8")


def markdown(page):
    return MarkdownIt("commonmark").enable("table").parse(PAGES[page].read_text(encoding="utf-8"))


def inline(page):
    return [child for token in markdown(page) for child in token.children or []]


def anchors(path):
    """The anchors of a page's headings, as GitHub makes them."""
    tokens = MarkdownIt("commonmark").parse(path.read_text(encoding="utf-8"))
    titles = [after.content for token, after in pairwise(tokens) if token.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
