"""Several runs as one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...errors import DataError
from .result import Row, Run


def open_run(folder: Path) -> Run:
    """Open an existing run.

    Raises:
        DataError: the folder holds no results.
    """
    if not (folder / "results.jsonl").is_file():
        raise DataError(f"{folder} holds no results.jsonl, so it is not the folder of a run; name what --out was")
    run = Run(folder)
    for row in run.rows:
        _check(row, folder)
    return run


_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(
        ("text_sha256", "device", "places", "stride", "judge", "text_tokens", "seed"),
        (str, int, float, type(None)),
    ),
    "text": (str, type(None)),
    **dict.fromkeys(("task", "protocol", "model", "rope", "dtype", "suite"), (str,)),
    **dict.fromkeys(("context", "trained_length", "target", "samples", "tokens", "documents"), (int, type(None))),
    **dict.fromkeys(("bucket_start", "bucket_end"), (int, type(None))),
    **dict.fromkeys(("loss", "loss_low", "loss_high", "perplexity", "bits_per_byte"), (int, float, type(None))),
}
"""What fields hold where a row has them."""

_NEEDED = ("protocol", "model", "rope", "text", "dtype", "context")


def _check(row: Row, folder: Path) -> None:
    """Refuse a row that no run wrote: tables and plots are made of these fields."""
    wrong = [key for key, kinds in _KINDS.items() if key in row and not isinstance(row[key], kinds)]
    if row.get("task") == "ppl":
        wrong += [key for key in _NEEDED if row.get(key) is None]
        if row.get("protocol") == "by-position":
            wrong += [key for key in ("bucket_start", "bucket_end") if row.get(key) is None]
    if wrong:
        raise DataError(
            f"{folder / 'results.jsonl'}: the row {row['key']!r} is damaged, {wrong[0]!r} is "
            f"{row.get(wrong[0])!r:.60}; delete its line to go on"
        )


def merge(runs: Sequence[Run], out: Path) -> Run:
    """Copy the rows and losses of all runs into the folder `out`; of one cell measured in several,
    the last counts."""
    merged = Run(out)
    for run in runs:
        for row in run.rows:
            if merged.find_key(row["key"]) != row:
                merged.copy(row, run.losses(row))
    return merged
