"""The tables of docs/reliability-versions.md, from what tests/versions/matrix.py stored in docs/results."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def tables() -> dict[str, str]:
    """Every table by the name of its block."""
    return {"versions": _transformers(), "torch": _torch(), "python": _python()}


def _transformers() -> str:
    rows = _rows("versions.json")
    lines = ["| transformers | with | passed | failed | reasons |", "|---" * 5 + "|"]
    for row in rows:
        others = [
            f"{name} {row['others'][name]}" for name in ("tokenizers", "huggingface-hub") if name in row["others"]
        ]
        lines.append(_line(row["transformers"], ", ".join(others), row["passed"], *_failures(row)))
    return "\n".join([*lines, "", _all_under(rows, "torch", "Python")])


def _torch() -> str:
    rows = _rows("torch_versions.json")
    lines = ["| torch | passed | failed | reasons |", "|---" * 4 + "|"]
    lines += [_line(row["torch"], row["passed"], *_failures(row)) for row in rows]
    return "\n".join([*lines, "", _all_under(rows, "transformers", "Python")])


def _python() -> str:
    rows = _rows("python_versions.json")
    lines = ["| Python | passed | skipped | failed | reasons |", "|---" * 5 + "|"]
    lines += [_line(row["python"], row["passed"], row["skipped"], *_failures(row)) for row in rows]
    return "\n".join([*lines, "", _all_under(rows, "transformers", "torch")])


def _rows(name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return rows


def _line(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _all_under(rows: list[dict[str, Any]], *names: str) -> str:
    machines = {", ".join(f"{name} {row[name.lower()]}" for name in names) for row in rows}
    return f"All under {' or '.join(sorted(machines))}."


def _failures(row: dict[str, Any]) -> tuple[int, str]:
    """How many tests of a row failed, and why."""
    reasons = Counter(_reason(found) for found in row["failed"])
    return len(row["failed"]), "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common())


def _reason(failure: str) -> str:
    """The first words of why a test failed."""
    _, _, message = failure.partition(": ")
    message = message.splitlines()[0].removeprefix('failed on setup with "').rstrip('"')
    message = message.removeprefix("ropewalk.errors.").split(" (its logits")[0]
    kind, bar, row = message.partition("AssertionError: | ")
    if bar and not kind and "refused: " in row:  # a family
        message = f"{row.split(' | ')[0]} refused: {row.split('refused: ')[1]}"
    return message.replace("|", chr(92) + "|").split(";")[0][:110].strip()
