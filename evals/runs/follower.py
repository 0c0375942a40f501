"""Runs of a model that is split over processes: all measure the same cells, and the first keeps what came out."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from pathlib import Path

from ...engine import split
from .result import Run

__all__ = ["open_run"]


def open_run(folder: Path) -> Run:
    """The run in `folder`; where a model is split, for all processes but the first a copy that goes with the process.

    So all of them find the same rows, and none is written twice.
    """
    if split.is_first() or not split.is_split():
        run = Run(folder)
    else:
        scratch = tempfile.mkdtemp(prefix="ropewalk-")
        atexit.register(shutil.rmtree, scratch, ignore_errors=True)
        run = Run(Path(scratch))
    if split.is_split():
        for row, losses in split.told_by_first([(row, run.losses(row)) for row in run.rows]):
            if not split.is_first():
                run.copy(row, losses)
    return run
