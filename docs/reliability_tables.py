"""The tables of docs/reliability.md and docs/reliability-mutations.md, from counts in docs/results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def tables() -> dict[str, str]:
    """Every table of docs/reliability.md by the name of its block."""
    return {"fuzz": _fuzz(), "guided fuzz": _guided_fuzz(), "long life": _long_life()}


def mutants_tables() -> dict[str, str]:
    """That of docs/reliability-mutations.md."""
    return {"mutants": _mutants()}


def _stored(name: str) -> Any:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def _fuzz() -> str:
    """What tests/fuzz/run.py counted."""
    rows = _stored("fuzz.json")
    lines = ["| parser | inputs | read | refused | failed | slowest | memory |", "|---" * 7 + "|"]
    for row in rows:
        counts = " | ".join(f"{row[key]:,}" for key in ("inputs", "read", "refused", "failed"))
        lines.append(f"| {row['parser']} | {counts} | {row['slowest_s']:.2g} s | +{row['grown_mb']} MB |")
    total = " | ".join(f"{sum(row[key] for row in rows):,}" for key in ("inputs", "read", "refused", "failed"))
    slowest, memory = max(row["slowest_s"] for row in rows), max(row["grown_mb"] for row in rows)
    return "\n".join([*lines, f"| **all** | {total} | {slowest:.2g} s | +{memory} MB |"])


def _guided_fuzz() -> str:
    """What tests/fuzz/guided.py counted."""
    rows = _stored("fuzz_guided.json")
    keys = ("executions", "read", "refused", "failed", "edges", "features")
    lines = [f"| parser | {' | '.join(keys)} | time |", "|---" * 8 + "|"]
    for row in rows:
        counts = " | ".join(f"{row[key]:,}" for key in keys)
        lines.append(f"| {row['parser']} | {counts} | {row['seconds'] / 60:.1f} min |")
    return "\n".join(lines)


def _long_life() -> str:
    """What tests/long_life.py saw."""
    found = _stored("long_life.json")
    memory, files = ([sample[key] for sample in found["samples"]] for key in ("memory_mb", "files"))
    same = "the same as" if found["same_answers"] else "other than"
    works = sum(found["works"].values())
    return (
        f"{found['minutes']:g} minutes on the tests' small model, {works:,} pieces of work: memory {memory[0]} MB at "
        f"the beginning, {memory[1]} MB after a twentieth of the time, {memory[-1]} MB at the end; files {files[0]} "
        f"and {files[-1]}; the answers at the end {same} those at the beginning, to the bit."
    )


def _mutants() -> str:
    """What came of the mutants, as tests/mutation/sample.py stored it: counts by file, survivors with their reasons."""
    found = _stored("mutants.json")
    lines = ["| file | mutants | tried | killed | equivalent | survived |", "|---" * 6 + "|"]
    reasons = []
    for files in found.values():
        for file, row in files.items():
            explained = [one for one in row["survivors"].values() if one["why"]]
            numbers = (
                row["mutants"],
                row["tried"],
                row["killed"],
                len(explained),
                len(row["survivors"]) - len(explained),
            )
            lines.append(f"| {file} | {' | '.join(map(str, numbers))} |")
            for one in row["survivors"].values():
                change = " becomes ".join(f"`{line[1:].strip()}`" for line in one["change"])
                reasons.append(f"- {file}: {change}. {one['why'] or '**Not explained.**'}")
    return "\n".join([*lines, "", *(reasons or ["No mutant survived."])])
