"""Several runs as one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import DataError
from .result import Run


def open_run(folder: Path) -> Run:
    """A run that is there.

    Raises:
        DataError: the folder holds no results.
    """
    if not (folder / "results.jsonl").is_file():
        raise DataError(f"{folder} holds no results.jsonl, so it is not the folder of a run; name what --out was")
    return Run(folder)


def merge(runs: Sequence[Run], out: Path) -> Run:
    """Copy the rows and losses of all runs into the folder `out`; of one cell measured in several, the last counts."""
    merged = Run(out)
    for run in runs:
        for row in run.rows:
            if merged.find_key(row["key"]) != row:
                merged.copy(row, run.losses(row))
    return merged
