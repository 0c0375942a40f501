"""Breaks the code in small ways, a random sample of them, and sees which the tests notice: `make mutants`.

    python tests/mutation/sample.py              # every group
    python tests/mutation/sample.py cache cover  # some

mutmut does the work, in a copy of the tree, since it does not follow the links in src/ropewalk. The results go into
docs/results/mutants.json, and from there into docs/reliability.md.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results" / "mutants.json"

EQUIVALENT = tomllib.loads((ROOT / "tests" / "mutation" / "equivalent.toml").read_text(encoding="utf-8"))["mutant"]
"""Changes that change nothing that can be seen, each with the line that it makes and why."""

SEED = 20
OUTCOMES = {0: "survived", 1: "killed", 3: "killed", 33: "untested", 5: "untested"}
"""By mutmut's exit codes; all others are mutants that never came to an end or crashed, which counts as noticed."""


@dataclass(frozen=True)
class Group:
    """Files, the fastest tests that cover them, and how many mutants are tried."""

    files: tuple[str, ...]
    tests: tuple[str, ...]
    count: int

    @property
    def first(self) -> str:
        """The longest function. mutmut makes all mutants, and learns which test runs which function, on its way to the
        first one of it."""
        package = ROOT / "src" / "ropewalk"
        functions = {}
        for file in (path for pattern in self.files for path in package.glob(pattern)):
            module = ".".join(file.relative_to(package.parent).with_suffix("").parts)
            for node in ast.parse(file.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.FunctionDef) and not node.decorator_list:
                    functions[f"{module}.x_{node.name}"] = (node.end_lineno or 0) - node.lineno
        return max(functions, key=lambda name: functions[name])


GROUPS = {
    "scaling": Group(
        ("scaling/*.py",),
        ("tests/scaling", "tests/test_plugins.py::test_a_scaler_that_cannot_be_used_is_refused_by_name"),
        80,
    ),
    "cover": Group(
        ("tokenizer_tools/cover.py", "tokenizer_tools/splits.py"),
        ("tests/tokenizer_tools/test_cover_small.py",),
        500,
    ),
    "attention": Group(
        ("engine/attention/causal.py", "engine/attention/banded.py", "engine/attention/blocks.py"),
        (
            "tests/engine/attention/test_causal.py",
            "tests/engine/attention/test_banded.py",
            "tests/engine/attention/test_kernel.py",
            "tests/engine/runners/test_gpu_on_cuda.py::test_a_prompt_in_bfloat16_is_read_by_the_fused_kernel",
        ),
        120,
    ),
    "cache": Group(
        ("engine/cache.py",),
        ("tests/engine/test_cache.py",),
        80,
    ),
    "generation": Group(
        ("engine/generation.py", "engine/sequence.py", "engine/batch.py", "engine/scheduler.py", "engine/sampling.py"),
        (
            "tests/engine/test_generation.py",
            "tests/engine/test_sampling.py",
            "tests/engine/test_scheduler.py",
            "tests/engine/test_texts.py",
            "tests/engine/test_half_characters.py",
            "tests/engine/test_printed.py",
            "tests/engine/test_packed.py",
            "tests/engine/test_out_of_memory.py",
            "tests/test_default_params.py",
        ),
        80,
    ),
    "plug-in": Group(  # backend.py imports vLLM: make interop runs it
        (
            "engine/vllm_plugin/register.py",
            "engine/vllm_plugin/rotary.py",
            "engine/vllm_plugin/vllm_objects.py",
            "engine/attention/paged.py",
            "engine/attention/paged_rope.py",
        ),
        ("tests/engine/vllm_plugin", "tests/engine/attention/test_paged.py"),
        80,
    ),
}


def prepare(work: Path, group: Group) -> None:
    """The tree with folders in the place of links, and mutmut's configuration."""
    shutil.rmtree(work, ignore_errors=True)
    without = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "src", work / "src", ignore=without)
    shutil.copytree(ROOT / "tests", work / "tests", ignore=without)
    lists = {
        "source_paths": ["src"],
        "only_mutate": [f"src/ropewalk/{file}" for file in group.files],
        "pytest_add_cli_args": [
            "-q",
            "-m",
            "not slow and not model",
            "-p",
            "no:cacheprovider",
        ],
        "pytest_add_cli_args_test_selection": list(group.tests),
    }
    lines = [f"{name} = {json.dumps(value)}" for name, value in lists.items()]
    lines += [
        'process_isolation = "forkserver"  # torch does not like to be forked',
        "use_git_change_detection = false",
        "timeout_multiplier = 6  # of the time that the tests take; 15 would be minutes for every endless loop",
    ]
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (work / "pyproject.toml").write_text("\n".join([project, "[tool.mutmut]", *lines, ""]), encoding="utf-8")


def mutmut(work: Path, *arguments: str) -> str:
    """Run mutmut in `work`."""
    command = [str(Path(sys.executable).with_name("mutmut")), *arguments]
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:4])} ...: {done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done.stdout


def exit_codes(work: Path) -> dict[str, dict[str, int | None]]:
    """What became of every mutant, by file."""
    folder = work / "mutants" / "src" / "ropewalk"
    return {
        str(path.relative_to(folder)).removesuffix(".meta"): json.loads(path.read_text())["exit_code_by_key"]
        for path in sorted(folder.rglob("*.meta"))
    }


def change(diff: str) -> Iterator[str]:
    """The lines of a diff that change something."""
    for line in diff.splitlines():
        if line[:1] in "+-" and line[:3] not in ("+++", "---"):
            yield line


def why(file: str, lines: list[str]) -> str:
    """The reason in EQUIVALENT for a change, found by the line that it makes; empty where there is none."""
    made = [line[1:].strip() for line in lines if line.startswith("+")]
    return next((one["why"] for one in EQUIVALENT if one["file"] == file and [one["line"]] == made), "")


def measure(group: Group, work: Path) -> dict[str, dict[str, object]]:
    """Counts and survivors by file."""
    prepare(work, group)
    mutmut(work, "run", "--max-children=1", f"{group.first}__mutmut_1")
    names = sorted(name for file in exit_codes(work).values() for name in file)
    sample = random.Random(SEED).sample(names, min(group.count, len(names)))
    mutmut(work, "run", "--max-children=1", *sample)
    return tally(work, sample)


def tally(work: Path, sample: list[str]) -> dict[str, dict[str, object]]:
    """What became of the sample."""
    rows: dict[str, dict[str, object]] = {}
    for file, codes in exit_codes(work).items():
        tried = [(name, OUTCOMES.get(code, "killed")) for name, code in codes.items() if name in sample]
        if tried:
            alive = {name: list(change(mutmut(work, "show", name))) for name, outcome in tried if outcome != "killed"}
            rows[file] = {
                "mutants": len(codes),
                "tried": len(tried),
                "killed": len(tried) - len(alive),
                "survivors": {name: {"change": lines, "why": why(file, lines)} for name, lines in alive.items()},
            }
    return rows


def main() -> None:
    """Run the groups asked for and keep what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", default=list(GROUPS))
    parser.add_argument("--work", type=Path, default=ROOT / ".mutants", help="where the copies lie")
    arguments = parser.parse_args()
    for name in arguments.groups:
        rows = measure(GROUPS[name], arguments.work / name)
        found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
        found[name] = rows
        RESULTS.write_text(json.dumps({name: found[name] for name in GROUPS if name in found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
