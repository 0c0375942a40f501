"""The tables of docs/reliability.md, from counts in docs/results."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"

VERSIONS = {"transformers": "versions.json", "torch": "torch_versions.json", "python": "python_versions.json"}
"""What tests/versions/matrix.py stored for each package that it varied."""


def tables() -> dict[str, str]:
    """Every table by the name of its block."""
    return {"fuzz": _fuzz(), "long life": _long_life(), "mutants": _mutants(), "versions": _versions()}


def _stored(name: str) -> Any:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def _fuzz() -> str:
    """What tests/fuzz/run.py and tests/fuzz/guided.py counted."""
    rows, guided = _stored("fuzz.json"), _stored("fuzz_guided.json")
    inputs, read, refused, failed = (_sum(rows, key) for key in ("inputs", "read", "refused", "failed"))
    slowest, memory = max(row["slowest_s"] for row in rows), max(row["grown_mb"] for row in rows)
    minutes, executions = sum(row["seconds"] for row in guided) / 60, _sum(guided, "executions")
    return "\n".join(
        [
            f"- {inputs} inputs to {len(rows)} parsers: {read} read, {refused} refused, {failed} failed.",
            f"  The slowest took {slowest:.2g} s, the largest growth of a process was {memory} MB. Parsers:",
            *_item(rows),
            f"- {executions} guided executions in {minutes:.0f} minutes: {_sum(guided, 'failed')} failed. Parsers:",
            *_item(guided),
        ]
    )


def _sum(rows: list[dict[str, Any]], key: str) -> str:
    return f"{sum(row[key] for row in rows):,}"


def _item(rows: list[dict[str, Any]]) -> list[str]:
    """The names of all parsers, as lines that go on a list item."""
    text = ", ".join(row["parser"] for row in rows)
    return textwrap.wrap(f"{text}.", 100, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)


def _long_life() -> str:
    """What tests/long_life.py saw."""
    found = _stored("long_life.json")
    memory, files = ([sample[key] for sample in found["samples"]] for key in ("memory_mb", "files"))
    same = "equal" if found["same_answers"] else "differ from"
    works = sum(found["works"].values())
    return (
        f"{found['minutes']:g} minutes on the tests' small model, {works:,} operations. Memory: {memory[0]} MB at "
        f"the start,\n{memory[1]} MB after a twentieth of the time, {memory[-1]} MB at the end. Open files: {files[0]} "
        f"and {files[-1]}.\nThe answers at the end {same} those at the start, bit for bit."
    )


def _mutants() -> str:
    """Counts of tests/mutation/sample.py by group."""
    lines = ["| group | mutants | tried | killed | equivalent | survived |", "|---" * 6 + "|"]
    for group, files in _stored("mutants.json").items():
        survivors = [one for row in files.values() for one in row["survivors"].values()]
        explained = sum(bool(one["why"]) for one in survivors)
        sums = [sum(row[key] for row in files.values()) for key in ("mutants", "tried", "killed")]
        lines.append(f"| {group} | {' | '.join(map(str, [*sums, explained, len(survivors) - explained]))} |")
    return "\n".join(lines)


def _versions() -> str:
    """Passed and failed tests by release; versions of the others that are not the usual ones in brackets."""
    usual = {name: _stored(VERSIONS["transformers"])[0][name] for name in ("torch", "python")}
    usual["transformers"] = _stored(VERSIONS["torch"])[0]["transformers"]
    lines = [
        f"With {', '.join(f'{name} {usual[name]}' for name in VERSIONS)} where nothing else is said:",
        "",
        "| release | passed | failed |",
        "|---" * 3 + "|",
    ]
    for varied, name in VERSIONS.items():
        for row in _stored(name):
            others = [f"{other} {row[other]}" for other in VERSIONS if other != varied and row[other] != usual[other]]
            release = f"{varied} {row[varied]}" + (f" ({', '.join(others)})" if others else "")
            lines.append(f"| {release} | {row['passed']} | {len(row['failed'])} |")
    return "\n".join(lines)
