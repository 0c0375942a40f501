"""Runs of a model that is split over processes: all measure the same cells, and the first keeps what came out."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from pathlib import Path

from ...engine import tensor_parallel
from .result import Run

__all__ = ["open_run"]


def open_run(folder: Path) -> Run:
    """The run in `folder`; where a model is split, for all processes but the first a copy that goes with the process.

    So all of them find the same rows, and none is written twice.
    """
    if tensor_parallel.is_first() or not tensor_parallel.is_split():
        run = Run(folder)
    else:
        scratch = tempfile.mkdtemp(prefix="ropewalk-")
        atexit.register(shutil.rmtree, scratch, ignore_errors=True)
        run = Run(Path(scratch))
    if tensor_parallel.is_split():
        for row, losses in tensor_parallel.broadcast_from_rank0([(row, run.losses(row)) for row in run.rows]):
            if not tensor_parallel.is_first():
                run.copy(row, losses)
    return run
