"""The public face: names, import weight, version, generated docs."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from generate import generated

import ropewalk as rw

ROOT = Path(__file__).resolve().parent.parent


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT / "tests", check=False)


def test_every_public_name_is_there_and_documented():
    for name in rw.__all__:
        value = getattr(rw, name)
        written = f"{name}("  # what a dataclass writes where nobody did
        assert name == "__version__" or (value.__doc__ and not value.__doc__.startswith(written)), name
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = rw.lod


def test_the_command_line_starts_without_torch():
    done = run(
        "import sys, ropewalk.cli.main, ropewalk.cli.measure, ropewalk.engine.checkpoints.assets; "
        "print({'torch', 'transformers', 'numpy', 'matplotlib', 'rich'} & set(sys.modules))"
    )
    assert done.stdout.strip() == "set()", done.stdout + done.stderr


def test_tokenizer_tools_imports_no_torch():
    names = [file.stem for file in (ROOT / "tokenizer_tools").glob("*.py") if file.stem != "__init__"]
    modules = ", ".join(f"ropewalk.tokenizer_tools.{name}" for name in names)
    done = run(f"import {modules}, sys; print('torch' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize("folder", ["engine", "scaling", "tokenizer_tools", "evals"])
def test_folders_refuse_to_be_imported_under_their_bare_names(folder, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    with pytest.raises(ImportError, match=f"import this package as 'ropewalk.{folder}'"):
        importlib.import_module(folder)


def test_the_changelog_has_the_version():
    assert f"## {rw.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_readme_is_short():
    """For someone who has never heard of it: 12 KB, and lines that fit a screen."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.encode()) <= 12 * 1024
    blocks = re.sub(r"```.*?```", "", text, flags=re.DOTALL).splitlines()
    assert max(len(line) for line in blocks if not line.startswith("|")) <= 105


def test_generated_docs_are_fresh():
    for path, content in generated().items():
        assert path.read_text(encoding="utf-8") == content, f"{path.name} is stale: run `make docs`"


def test_no_stored_result_names_a_path_of_the_machine_it_was_measured_on():
    rows = [row for file in (ROOT / "docs" / "results").rglob("*.jsonl") for row in file.read_text().splitlines()]
    assert rows and not [row[:200] for row in rows if re.search(r'"/\w+/', row)]
