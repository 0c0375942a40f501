"""Runs a fixed selection of tests against several versions of transformers: `make versions`.

    python tests/versions/matrix.py                        # all of VERSIONS
    python tests/versions/matrix.py 5.15.0 --families all  # one version, and every architecture

nox and tox make a whole environment for each version, a gigabyte of torch each. Here a version is a folder with
transformers and those of its requirements that it wants otherwise, in front of the environment that runs this. The
results go into docs/results/versions.json, by version, and from there into docs/reliability-versions.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import distributions, version
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results" / "versions.json"

VERSIONS = ("5.10.1", "5.13.1", "5.14.1", "5.16.1", "5.18.0", "5.20.2", "5.23.0")
"""Those of the table: some below the range of pyproject.toml, its oldest, its newest, and one in between."""

TESTS = (
    "tests/scaling/test_frequencies_of_transformers.py",
    "tests/scaling/test_hf.py",
    "tests/scaling/test_hf_write.py",
    "tests/engine/test_patch.py",
    "tests/engine/test_band_refusals.py",
    "tests/engine/test_band_generate.py",
    "tests/engine/test_cache.py",
    "tests/engine/test_attention.py",
    "tests/engine/test_load.py",
    "tests/engine/test_api.py",
    "tests/engine/test_families.py",
)
"""What touches transformers: its configs, rotary modules, attention and mask registry, caches, `generate`, loading."""

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

CHANGING = {"transformers", "huggingface-hub", "tokenizers"}
"""What a version of transformers may choose for itself; all else is as in constraints.txt."""

IN_FRONT = "PYTHONPATH"


def canonical(name: str) -> str:
    """A package name as pip compares it."""
    return name.lower().replace("_", "-")


def install(release: str, folder: Path) -> dict[str, str]:
    """Put transformers `release` into `folder`; returns what else is another version there than in the environment."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if canonical(line.partition("==")[0]) not in CHANGING]
    if not (folder / "transformers").is_dir():
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
            constraints.write("\n".join(kept))
            constraints.flush()
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder)]
            subprocess.run([*command, "--constraint", constraints.name, f"transformers=={release}"], check=True)
    own = {canonical(found.name): found.version for found in distributions()}
    there = {canonical(found.name): found.version for found in distributions(path=[str(folder)])}
    return {
        name: number for name, number in sorted(there.items()) if own.get(name) != number and name != "transformers"
    }


def run(release: str, folder: Path, families: list[str]) -> dict[str, object]:
    """The selection under transformers `release`."""
    others = install(release, folder)
    chosen = [test for test in TESTS if "test_families" not in test]
    chosen += [
        f"{TESTS[-1]}::test_family_is_served_or_refused_as_the_docs_say{name and f'[{name}]'}" for name in families
    ]
    report = folder / "report.xml"
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "not slow and not model", f"--junitxml={report}", *chosen],
        cwd=ROOT,
        env={**os.environ, IN_FRONT: str(folder), "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [
        f"{case.get('classname', '').removeprefix('tests.')}::{case.get('name')}: {found.get('message', '')[:300]}"
        for case in cases
        for found in (*case.iter("failure"), *case.iter("error"))
    ]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {
        "transformers": release,
        "others": others,
        "torch": version("torch"),
        "python": platform.python_version(),
        "families": "all" if families == [""] else len(families),
        "passed": len(cases) - len(failed) - skipped,
        "skipped": skipped,
        "failed": failed,
        "seconds": round(time.perf_counter() - started),
    }


def main() -> None:
    """Run the versions asked for and keep what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", default=VERSIONS)
    parser.add_argument("--families", default="some", choices=("some", "all"))
    parser.add_argument("--work", type=Path, default=ROOT / ".venv-versions", help="where the folders lie")
    arguments = parser.parse_args()
    for release in arguments.versions:
        row = run(release, arguments.work / release, [""] if arguments.families == "all" else FAMILIES)
        rows = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else []
        rows = [*(one for one in rows if one["transformers"] != release), row]
        rows.sort(key=lambda one: [int(part) for part in one["transformers"].split(".")])
        RESULTS.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
