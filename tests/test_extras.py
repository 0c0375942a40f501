"""A plain install generates and patches; what only measurements need is the extra `ropewalk[evals]`."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from prepared import python

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def names(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w.-]+(\[\w+\])?", line)[0] for line in requirements}


EXTRA = names(PROJECT["optional-dependencies"]["evals"])
SENTENCE = "measuring and plotting need ropewalk[evals] (not installed: {}): pip install 'ropewalk[evals]'"


@pytest.fixture
def without(tmp_path):
    """A function that runs code in a process in which some packages cannot be imported."""

    def run(hidden: set[str], code: str) -> subprocess.CompletedProcess[str]:
        hide = (
            "import sys\n"
            f"gone = [name for name in sys.modules if name.partition('.')[0] in {sorted(hidden)}]\n"
            f"sys.modules.update(dict.fromkeys([*gone, *{sorted(hidden)}]))\n"
        )
        (tmp_path / "script.py").write_text(hide + code)
        return python(tmp_path / "script.py")

    return run


def test_the_list_in_evals_is_that_of_the_extra():
    from ropewalk.evals import _NEEDED

    assert set(_NEEDED) == EXTRA
    assert not EXTRA & names(PROJECT["dependencies"])


def test_only_evals_imports_what_the_extra_brings():
    pattern = re.compile(rf"^\s*(?:from|import) ({'|'.join(EXTRA)})\b", re.MULTILINE)
    folders = ("scaling", "tokenizer_tools", "engine", "src/ropewalk/cli")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    assert not [file for file in files if pattern.search(file.read_text(encoding="utf-8"))]
    assert any(pattern.search(file.read_text(encoding="utf-8")) for file in (ROOT / "evals").rglob("*.py"))


def test_tests_and_other_extras_that_measure_have_it():
    for extra in ("dev", "lm-eval", "llama-cpp"):
        assert "ropewalk[evals]" in names(PROJECT["optional-dependencies"][extra])


def test_loading_and_patching_work_without_the_extra_and_measuring_says_what_is_missing(without):
    done = without(
        EXTRA - {"httpx2"},  # huggingface_hub imports it too
        """import ropewalk as rw
for name in rw.__all__:
    if name not in ("evals", "tune"):
        getattr(rw, name)
for name in ("evals", "tune"):
    try:
        getattr(rw, name)
    except rw.ConfigError as error:
        print(error)
""",
    )
    assert done.stdout.splitlines() == 2 * [SENTENCE.format("matplotlib, scipy, cmaes, wonderwords")], done.stderr


def test_a_command_says_it_in_one_sentence(without):
    done = without({"scipy"}, "from ropewalk.cli.main import main; sys.argv[1:] = ['ppl', 'no-model']; main()")
    assert (done.returncode, done.stderr) == (2, f"ropewalk: {SENTENCE.format('scipy')}\n")


def test_the_source_package_has_all_of_ropewalk_and_no_tests(tmp_path):
    """setuptools would take test modules from `tests`, without what they import."""
    build = ["-c", "import setuptools; setuptools.setup()", "-q", "egg_info", "--egg-base", tmp_path]
    subprocess.run([sys.executable, *build], cwd=ROOT, check=True)
    listed = (tmp_path / "ropewalk.egg-info" / "SOURCES.txt").read_text(encoding="utf-8").splitlines()
    assert not [name for name in listed if name.startswith("tests")]
    assert {"README.md", "LICENSE", "src/ropewalk/engine/load.py", "src/ropewalk/evals/reports/report.html.j2"} <= set(
        listed
    )
