"""Runs the tests against several versions of transformers, torch and Python: `make versions`.

    python tests/versions/matrix.py                                       # TRANSFORMERS and TORCH: those of the docs
    python tests/versions/matrix.py --transformers 5.15.0 --families all  # one version, and every architecture
    python tests/versions/matrix.py --torch 2.9.1                         # two to six gigabytes, deleted afterwards
    python tests/versions/matrix.py --python python3.13                   # a whole environment, deleted afterwards

nox and tox make a whole environment for each version, gigabytes of torch each. Here a version is a folder with the
package and what it wants otherwise, in front of the environment that runs this; only another Python needs one of its
own. The results go into docs/results/versions.json (transformers) and torch_versions.json (torch and Python), and from
there into docs/reliability.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

from packages import install_project, install_torch, install_transformers

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"

TRANSFORMERS = ("5.10.1", "5.13.1", "5.14.1", "5.16.1", "5.18.0", "5.20.2", "5.23.0")
"""Those of the table: some below the range of pyproject.toml, its oldest, its newest, and one in between."""

TORCH = ("2.9.0", "2.10.0", "2.11.0", "2.12.1", "2.13.0", "2.14.1", "2.15.0")
"""The oldest of the range, and one of every minor version since."""

TRANSFORMERS_TESTS = (
    "tests/scaling/test_frequencies_of_transformers.py",
    "tests/scaling/test_hf.py",
    "tests/scaling/test_hf_reach.py",
    "tests/scaling/test_hf_write.py",
    "tests/engine/patches/test_patch.py",
    "tests/engine/patches/test_band_refusals.py",
    "tests/engine/patches/test_band_generate.py",
    "tests/engine/test_cache.py",
    "tests/engine/attention/test_causal.py",
    "tests/engine/test_load.py",
    "tests/engine/test_api.py",
)
"""What touches transformers: its configs, rotary modules, attention and mask registry, caches, `generate`, loading."""

TORCH_TESTS = (
    *TRANSFORMERS_TESTS,
    "tests/engine/attention/test_banded.py",
    "tests/engine/patches/test_band_training.py",
    "tests/engine/test_kv_cache.py",
    "tests/engine/test_sampling.py",
    "tests/engine/test_session_files.py",
    "tests/engine/runners/test_kernels_attention.py",
    "tests/engine/runners/test_kernels_linear.py",
    "tests/engine/runners/test_kernels_simd.py",
    "tests/engine/runners/test_kernels_elementwise.py",
    "tests/engine/runners/test_compiled.py",
    "tests/engine/runners/test_compiled_batches.py",
    "tests/engine/runners/test_compiled_scalers.py",
    "tests/engine/runners/test_compiled_settings.py",
)
"""What touches torch besides: attention in bands, gradients, sampling, files of tensors, and the memory that the
compiled network shares with it."""

PYTHON_TESTS = (*TORCH_TESTS, "tests/test_public.py", "tests/test_plugins.py", "tests/tokenizer_tools")

FAMILIES = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "cohere2",
    "gpt_oss",
    "deepseek_v3",
    "gpt_neox",
    "phi3",
    "glm4",
    "olmo2",
    "falcon",
]
"""Architectures that stand for the ways in which rotary positions are done; all of them take minutes."""

FAMILY_TEST = "tests/engine/patches/test_families.py::test_family_is_served_or_refused_as_the_docs_say"

ASK = """
import json, platform, torch, transformers
versions = {"transformers": transformers.__version__, "torch": torch.__version__, "python": platform.python_version()}
print(json.dumps(versions))
"""


def run(interpreter: Path, in_front: list[Path], tests: list[str]) -> dict[str, object]:
    """`tests` under `interpreter`, with the packages in the folders `in_front` before its own."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, [*in_front, ROOT / "src"])),
        "HF_HUB_OFFLINE": "1",
    }
    asked = subprocess.run([interpreter, "-c", ASK], env=environment, check=True, stdout=subprocess.PIPE, text=True)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        # the row of an earlier release is not in the docs yet
        stale = ["--deselect", "tests/test_public.py::test_generated_docs_are_fresh"]
        chosen = ["-m", "not slow and not model", *stale, f"--junitxml={report}", *tests]
        subprocess.run([interpreter, "-m", "pytest", "-q", *chosen], cwd=ROOT, env=environment, check=False)
        cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [
        f"{case.get('classname', '').removeprefix('tests.')}::{case.get('name')}: {found.get('message', '')[:300]}"
        for case in cases
        for found in (*case.iter("failure"), *case.iter("error"))
    ]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {
        **json.loads(asked.stdout),
        "passed": len(cases) - len(failed) - skipped,
        "skipped": skipped,
        "failed": failed,
        "seconds": round(time.perf_counter() - started),
    }


def keep(row: dict[str, object], name: str) -> None:
    """Put `row` into docs/results/`name`, in place of an older one of the same three versions."""
    file = RESULTS / name
    rows = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    rows = [*(one for one in rows if key(one) != key(row)), row]
    rows.sort(key=key)
    file.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def key(row: dict[str, object]) -> list[list[int]]:
    """The versions of a row, in the order of the tables."""
    names = ("python", "torch", "transformers")
    return [[int(part) for part in str(row[name]).partition("+")[0].split(".")] for name in names]


@contextmanager
def deleted_afterwards(folder: Path) -> Iterator[Path]:
    """`folder`, which is gone at the end unless it was there before."""
    there = folder.is_dir()
    try:
        yield folder
    finally:
        if not there:
            shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """Run the versions asked for and keep what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transformers", nargs="+", default=[])
    parser.add_argument("--torch", nargs="+", default=[])
    parser.add_argument("--python", nargs="+", default=[], help="interpreters, by name or path")
    parser.add_argument("--families", default="some", choices=("some", "all"))
    parser.add_argument("--work", type=Path, default=ROOT / ".venv-versions", help="where the folders lie")
    arguments = parser.parse_args()
    if not (arguments.transformers or arguments.torch or arguments.python):
        arguments.transformers, arguments.torch = TRANSFORMERS, TORCH
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    own = Path(sys.executable)
    families = [FAMILY_TEST] if arguments.families == "all" else [f"{FAMILY_TEST}[{name}]" for name in FAMILIES]

    for release in arguments.transformers:
        folder = work / release
        others = install_transformers(release, folder)
        row = run(own, [folder], [*TRANSFORMERS_TESTS, *families])
        counted = "all" if arguments.families == "all" else len(families)
        keep({**row, "others": others, "families": counted}, "versions.json")
    for release in arguments.torch:
        with deleted_afterwards(work / f"torch-{release}") as folder:
            if release != version("torch").partition("+")[0]:
                install_torch(release, folder)
            keep(run(own, [folder], [*TORCH_TESTS, *families]), "torch_versions.json")
    for interpreter in arguments.python:
        with deleted_afterwards(work / Path(interpreter).name) as folder:
            environment = install_project(interpreter, folder)
            keep(run(environment, [], [*PYTHON_TESTS, *families]), "python_versions.json")


if __name__ == "__main__":
    main()
