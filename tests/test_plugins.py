"""Scalers and tasks of other packages: found, loaded when asked for, and refused in one sentence."""

import logging
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner

from ropewalk.cli.main import cli
from ropewalk.errors import ConfigError, RopewalkError
from ropewalk.evals.retrieval.tasks import TASKS
from ropewalk.scaling import METHODS, Factored, YaRN, parse

SCALER = """
from dataclasses import dataclass
from typing import ClassVar

from ropewalk.scaling import Factored

@dataclass(frozen=True, kw_only=True)
class Stretch(Factored):
    name: ClassVar[str] = "stretch"
"""

TASK = """
from ropewalk.evals.retrieval.task import Task

class Riddle(Task):
    name = "riddle"
    new_tokens = 3

    def draft(self, random, units, place): ...
    def mark(self, written, answers): ...
"""


def project(name, kind="scalers", version="0.3", **points):
    lines = "\n".join(f'{key.replace("_", "-")} = "{value}"' for key, value in points.items())
    return f'[project]\nname = "{name}"\nversion = "{version}"\n[project.entry-points."ropewalk.{kind}"]\n{lines}\n'


@pytest.fixture
def stretch(installed):
    return installed({"stretching.py": SCALER, "pyproject.toml": project("rope-stretch", stretch="stretching:Stretch")})


def test_a_scaler_of_another_package_is_parsed_and_composed(stretch):
    scaler = parse("stretch:2|logn")
    assert str(scaler) == "stretch:2|logn" and parse(str(scaler)) == scaler
    assert issubclass(METHODS["stretch"], Factored) and list(METHODS)[-1] == "stretch"


def test_nothing_of_another_package_is_loaded_before_it_is_asked_for(stretch):
    assert str(parse("yarn:2")) == "yarn:2" and "stretch" in METHODS
    with pytest.raises(ConfigError, match=r"unknown scaler 'strech'\. Did you mean 'stretch'\?"):
        parse("strech:2")
    assert "stretching" not in sys.modules
    parse("stretch:2")
    assert "stretching" in sys.modules


@pytest.mark.slow
def test_a_package_that_is_imported_before_ropewalk_asks_for_it_works(stretch):
    code = "import stretching, ropewalk; print(ropewalk.parse('stretch:3'))"
    environment = os.environ | {"PYTHONPATH": str(stretch)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.strip() == "stretch:3", done.stderr


BROKEN = {
    "no module": ("", "nowhere:Stretch", "ModuleNotFoundError: No module named 'nowhere'"),
    "no class": ("", "stretching:Stretch", "AttributeError: .*Stretch"),
    "an error in it": ("1 / 0", "stretching:Stretch", "ZeroDivisionError: division by zero"),
    "an exit": ("raise SystemExit(3)", "stretching:Stretch", "SystemExit: 3"),
    "no scaler": ("Stretch = 4", "stretching:Stretch", "4 is not a subclass of ropewalk.scaling.Scaler"),
    "another name": (SCALER.replace('"stretch"', '"strech"'), "stretching:Stretch", "Stretch.name is 'strech'"),
    "no dataclass": (
        SCALER.replace("@data", "# @data"),
        "stretching:Stretch",
        "Stretch needs the decorator @dataclass",
    ),
    "not frozen": (SCALER.replace("frozen=True, ", ""), "stretching:Stretch", "TypeError: cannot inherit non-frozen"),
    "no facet": (
        SCALER.replace("Factored", "Scaler"),
        "stretching:Stretch",
        "Stretch.facet is None; it must be one of frequencies, wavelength grid, ",
    ),
}


@pytest.mark.parametrize(("source", "point", "reason"), BROKEN.values(), ids=BROKEN)
def test_a_scaler_that_cannot_be_used_is_refused_by_name(installed, caplog, source, point, reason):
    installed({"stretching.py": source, "pyproject.toml": project("rope-stretch", stretch=point)})
    message = f"the scaler 'stretch' of rope-stretch 0.3 cannot be used: {reason}"
    with pytest.raises(ConfigError, match=message):
        parse("stretch:2")
    assert parse("yarn:2") == YaRN(factor=2)
    assert "stretch" not in list(METHODS)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_names_that_no_spec_could_hold_are_refused(installed):
    points = {"Stretch": "stretching:Stretch"}
    installed({"stretching.py": SCALER, "pyproject.toml": project("rope-stretch", **points)})
    with pytest.raises(ConfigError, match="lower-case letters, digits and hyphens"):
        METHODS["Stretch"]


def test_the_name_of_a_built_in_scaler_is_refused(installed, caplog):
    source = SCALER.replace('"stretch"', '"yarn"')
    installed({"stretching.py": source, "pyproject.toml": project("rope-stretch", yarn="stretching:Stretch")})
    assert METHODS["yarn"] is YaRN and list(METHODS).count("yarn") == 1
    assert caplog.messages == ["the scaler 'yarn' of rope-stretch 0.3 cannot be used: a built-in one has this name"]
    assert "stretching" not in sys.modules


def test_a_name_that_two_packages_have_is_refused(installed, stretch):
    installed({"other.py": SCALER, "pyproject.toml": project("rope-other", stretch="other:Stretch")})
    with pytest.raises(ConfigError, match=r"of rope-(other|stretch) 0.3 and rope-(other|stretch) 0.3 cannot be used"):
        parse("stretch:2")


def test_the_shell_names_a_broken_package_and_goes_on(installed):
    folder = installed({"stretching.py": "1 / 0", "pyproject.toml": project("rope-stretch", stretch="stretching:S")})
    code = (
        "import sys; from ropewalk.cli.main import cli, main; cli(['scalers'], standalone_mode=False);"
        "sys.argv[1:] = ['show', 'stretch:2']; main()"
    )
    environment = os.environ | {"PYTHONPATH": str(folder)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    sentence = "the scaler 'stretch' of rope-stretch 0.3 cannot be used: ZeroDivisionError: division by zero\n"
    assert done.stderr == f"{sentence}ropewalk: {sentence}" and done.returncode == 2
    assert "yarn" in done.stdout and "stretch:" not in done.stdout


def refused(task, message):
    error = CliRunner().invoke(cli, ["ask", task, "nothing"]).exception
    assert isinstance(error, RopewalkError)
    assert message in str(error)


def test_a_task_of_another_package_is_a_suite_of_its_own(installed):
    installed({"riddles.py": TASK, "pyproject.toml": project("rope-riddle", "tasks", riddle="riddles:Riddle")})
    assert "riddles" not in sys.modules
    refused("ridle", "unknown task 'ridle'. Did you mean 'riddle'?")
    assert TASKS["riddle"].name == "riddle" and "riddles" in sys.modules


@pytest.mark.parametrize(
    ("source", "name", "reason"),
    [
        ("1 / 0", "riddle", "ZeroDivisionError"),
        ("Riddle = 3", "riddle", "3 is not a subclass of ropewalk.evals.Task"),
        (TASK.replace("def mark", "def remark"), "riddle", "TypeError: Can't instantiate abstract class Riddle"),
        (TASK.replace('"riddle"', '"rhyme"'), "riddle", "Riddle.name is 'rhyme'; it must be the entry point's name"),
    ],
)
def test_a_task_that_cannot_be_used_is_refused_by_name(installed, source, name, reason):
    installed({"riddles.py": source, "pyproject.toml": project("rope-riddle", "tasks", **{name: "riddles:Riddle"})})
    refused(name, f"the task {name!r} of rope-riddle 0.3 cannot be used: {reason}")
    assert TASKS["passkey"].name == "passkey"


def test_the_name_of_a_built_in_task_is_refused(installed, caplog):
    installed({"riddles.py": TASK, "pyproject.toml": project("rope-riddle", "tasks", vt="riddles:Riddle")})
    assert "riddles" not in sys.modules and len(TASKS) == len(TASKS.built_in)
    assert caplog.messages == ["the task 'vt' of rope-riddle 0.3 cannot be used: a built-in one has this name"]
