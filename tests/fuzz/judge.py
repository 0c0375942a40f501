"""What counts as a failure of a parser, for both fuzzers, and where such inputs are kept."""

from __future__ import annotations

import pickle
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
KEPT = ROOT / "runs" / "fuzz"
MOST_SECONDS = 10
MOST_MEMORY = 4 * 2**30  # bytes that a process may take more than it had


def judge(read: Callable[[Any], object], kept: Path, value: Any, found: Counter[str]) -> None:
    """Read one input, count what came of it, and keep the first failure of each kind and place."""
    from ropewalk.errors import RopewalkError

    began = time.process_time()
    try:
        read(value)
        outcome = "read"
    except RopewalkError:
        outcome = "refused"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        outcome = "failed"
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        where = f"{Path(trace.tb_frame.f_code.co_filename).name}-{trace.tb_lineno}" if trace else "unknown"
        keep(kept / f"{type(error).__name__}-{where}", value, str(error))
    if (seconds := time.process_time() - began) > MOST_SECONDS:
        outcome = "failed"
        keep(kept / "too-long", value, f"{seconds:.1f} s")
    found[outcome] += 1


def keep(file: Path, value: Any, reason: str) -> None:
    """Store a failing input, unless one of its kind is there."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(pickle.dumps(value))
        print(f"FAILED {file.name}: {' '.join(reason.split())[:160]}", file=sys.stderr, flush=True)
