"""Python in a process of its own, without the seconds that torch and transformers take to import.

The process is forked from one that has imported them, and neither ropewalk nor numba, and has computed nothing: what a
script imports of ropewalk is as in any new process, and numba reads the environment that it gets.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

LIBRARIES = (
    "gguf",
    "scipy.optimize",
    "torch.distributed.tensor",
    "torch.nn.attention.bias",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
)

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(list(LIBRARIES))


def python(
    *arguments: object, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """What `python ARGUMENTS` does: a script, or `-m` and a module, with its arguments.

    Args:
        env: variables that are set beside those of this process. Libraries that read one while they are imported do
            not see it.
    """
    words = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        process = context.Process(target=_run, args=(words, folder, cwd or Path.cwd(), {**os.environ, **(env or {})}))
        process.start()
        process.join()
        said, errors = (file.read_text() if file.exists() else "" for file in _files(folder))
    return subprocess.CompletedProcess(words, process.exitcode or 0, said, errors)


def _files(folder: Path) -> tuple[Path, Path]:
    return folder / "stdout", folder / "stderr"


def _run(words: list[str], folder: Path, cwd: Path, env: dict[str, str]) -> None:
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    out, err = _files(folder)
    with out.open("w") as said, err.open("w") as errors, redirect_stdout(said), redirect_stderr(errors):
        os.dup2(said.fileno(), 1)
        os.dup2(errors.fileno(), 2)
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            sys.path[0] = str(Path(words[0]).parent)
            runpy.run_path(words[0], run_name="__main__")
