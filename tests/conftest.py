"""Fixtures that more than one folder of tests uses."""

from __future__ import annotations

import gc
import getpass
import json
import os
import random
import sys
import sysconfig
import tempfile
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

# Small tensors: more threads cost more than they give, and `make test` runs a worker for every core. The variable is
# for the processes that tests start; libraries here have read it already.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")

# torch does not see ATEN_CPU_CAPABILITY in its cache of compiled code, and code for other vectors gives wrong masks
_compiled = f"torchinductor_{getpass.getuser()}_{torch.backends.cpu.get_cpu_capability()}"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir(), _compiled)))
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # else a pool of processes, each of which imports torch

# No deadline: tests share their machine, and a slow example is not a wrong one. `make test` runs the same examples
# every time, so that a test that fails fails because of a change; `make fuzz` runs other examples, and more of them.
settings.register_profile("ropewalk", deadline=None, max_examples=50, derandomize=True, print_blob=True)
settings.register_profile("fuzz", deadline=None, max_examples=500, derandomize=False, print_blob=True)
settings.load_profile("ropewalk")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """torch's first seed is another one in every process: a test that draws numbers would pass or fail by chance."""
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(0)


def pytest_collection_finish():
    """Leave what is imported and collected out of garbage collections, which take a second each with it."""
    gc.collect()
    gc.freeze()


TINY = Path(__file__).parent / "data" / "tiny-llama"


@pytest.fixture(scope="session")
def tiny_folder() -> Path:
    """A real, if tiny, Llama as a Hugging Face folder: trained at 256 tokens on Python sources by
    `tests/train_tiny.py`. Read only."""
    return TINY


@pytest.fixture(scope="session")
def held_out_texts() -> list[str]:
    """Python sources that the tiny model was not trained on, one text per file of the running interpreter.

    The files differ a little between Python releases, and a few exist in one release only.
    """
    record = json.loads((TINY / "training.json").read_text(encoding="utf-8"))
    library = Path(sysconfig.get_path("stdlib"))
    files = (library / name for name in record["held_out_files"])
    return [file.read_text(encoding="utf-8", errors="replace") for file in files if file.is_file()]


@pytest.fixture
def no_plots(monkeypatch):
    """Runs are reported without plots, which take longer than what is measured."""
    for plots in ("plot_run", "plot_retrieval"):
        monkeypatch.setattr(f"ropewalk.evals.reports.report.{plots}", lambda run: [])


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Installs a package for the length of a test: its files by name, `pyproject.toml` among them. They are put, with
    the metadata that pip would write, into a folder of the path."""
    from ropewalk.evals.retrieval.tasks import TASKS
    from ropewalk.scaling import METHODS

    modules = set(sys.modules)

    def look_again():
        for plugins in (METHODS, TASKS):
            vars(plugins).pop("_entry_points", None)
            vars(plugins).pop("_usable", None)
            plugins._loaded.clear()

    def install(files: dict[str, str]) -> Path:
        project = tomllib.loads(files["pyproject.toml"])["project"]
        folder = tmp_path / "installed" / project["name"]
        metadata = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
        metadata.mkdir(parents=True)
        head = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
        (metadata / "METADATA").write_text(head)
        groups = project["entry-points"].items()
        lines = [line for group, points in groups for line in (f"[{group}]", *map(" = ".join, points.items()))]
        (metadata / "entry_points.txt").write_text("\n".join(lines))
        for name, content in files.items():
            (folder / name).write_text(content)
        monkeypatch.syspath_prepend(folder)
        look_again()
        return folder

    yield install
    for name in set(sys.modules) - modules:
        if str(tmp_path) in (getattr(sys.modules[name], "__file__", None) or ""):
            del sys.modules[name]
    look_again()
