"""Puts other releases of packages into folders, to be put in front of an environment's own."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

CHANGING = {"transformers", "huggingface-hub", "tokenizers"}
"""What a version of transformers may choose for itself; all else is as in constraints.txt."""


def canonical(name: str) -> str:
    """A package name as pip compares it."""
    return name.lower().replace("_", "-")


def pip(*arguments: str, interpreter: str | Path = sys.executable) -> None:
    """Run pip."""
    command = [str(interpreter), "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    subprocess.run(command, check=True, cwd=ROOT)


def install_transformers(release: str, folder: Path) -> dict[str, str]:
    """Put transformers `release` into `folder`; returns what else is another version there than in the environment."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if canonical(line.partition("==")[0]) not in CHANGING]
    if not (folder / "transformers").is_dir():
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
            constraints.write("\n".join(kept))
            constraints.flush()
            target = ("--target", str(folder), "--constraint", constraints.name)
            pip("install", *target, f"transformers=={release}")
    own = {canonical(found.name): found.version for found in distributions()}
    there = {canonical(found.name): found.version for found in distributions(path=[str(folder)])}
    return {
        name: number for name, number in sorted(there.items()) if own.get(name) != number and name != "transformers"
    }


def install_torch(release: str, folder: Path) -> None:
    """Put torch `release` into `folder`, with the CUDA libraries without which it cannot be imported; triton can lack.

    All else that it requires is in the environment. An older library of the same major version of CUDA does not do.
    """
    if (folder / "torch").is_dir():
        return
    target = ("install", "--no-deps", "--target", str(folder))
    pip(*target, f"torch=={release}")
    found = next(iter(distributions(name="torch", path=[str(folder)])))
    libraries = [line for line in found.requires or [] if line.startswith(("nvidia-", "cuda-toolkit"))]
    if libraries:
        pip("install", "--target", str(folder), *libraries)


def install_project(interpreter: str, folder: Path) -> Path:
    """An environment of another Python with what `make` installs; returns its interpreter."""
    own = folder / "bin" / "python"
    if not own.is_file():
        subprocess.run([interpreter, "-m", "venv", str(folder)], check=True)
        pip("install", "--constraint", "constraints.txt", "--editable", ".[dev]", interpreter=own)
    return own
