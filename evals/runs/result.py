"""The folder of a run: `Run.add` writes a row of results.

A row is one line of results.jsonl. The per-token losses are stored in files beside it, the
environment in env.json.

    run = Run(Path("runs/a"))
    run.write_environment()
    with run.claim(key) as is_ours:          # false while another process measures it
        if is_ours and run.find(recipe) is None:
            run.add(recipe, measured, losses)

Several processes may share a folder. A line is added under the folder's lock. A claim is a lock
that the system releases when the process ends, even if it is killed.

A recipe says what is measured (method, protocol, model, text, lengths, dtype). `measured` is the
result.
"""

from __future__ import annotations

import atexit
import errno
import hashlib
import importlib.metadata
import io
import json
import math
import os
import platform
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from ...engine import tensor_parallel
from ...engine.storage import write_atomic
from ...errors import DataError, Setting

_MENDS: dict[int | None, str] = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free some space, or "),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "allow writing to it, or "),
}
"""What the user of a folder that cannot be written can do, by the error."""

_KEY = re.compile(r"\w{1,64}")  # also a file name

Row = dict[str, Any]
"""`key`, then the fields of the recipe, then the measured fields. All values are JSON."""

Losses = np.ndarray[tuple[int], np.dtype[np.float32]]
"""Nats per scored token, float32 [tokens], in the order of the text."""


class Run:
    """A folder of results. A run can be interrupted at any time and continued, and several
    processes can share it.

    Args:
        folder: created if it does not exist.

    Raises:
        DataError: `folder` is a file or cannot be created, or a line of its results.jsonl is
            damaged. An incomplete last line of a killed run is ignored, and removed by the next
            write.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.started = datetime.now(UTC).isoformat(timespec="seconds")
        self._rows: dict[str, Row] = {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise DataError(f"{self.folder} is a file or lies in one; give a folder for the run") from None
        except OSError as error:
            raise self._unwritable(error) from error
        self._file = self.folder / "results.jsonl"
        self._lock = filelock.FileLock(self.folder / ".lock", is_singleton=True)
        self._read, self._lines = 0, 0  # bytes and complete lines of the file that are in `_rows`
        self._unended = False  # True: a complete row without a newline follows them
        self.refresh()

    @property
    def rows(self) -> list[Row]:
        """All rows in the order of measuring. If a recipe was measured twice, the last row counts."""
        return list(self._rows.values())

    def find(self, recipe: Mapping[str, Any]) -> Row | None:
        """The row of exactly this recipe, or None."""
        return self._rows.get(recipe_key(recipe))

    def find_key(self, key: str) -> Row | None:
        """The row with this key, or None."""
        return self._rows.get(key)

    def add(self, recipe: Mapping[str, Any], measured: Mapping[str, Any], losses: Losses | None = None) -> Row:
        """Write a row: first its losses, then its line. It survives the end of the process.

        Numbers that are not finite are stored as null. A row whose `loss` is null is shown as not
        measured, with `measured["reason"]` as the reason.

        Args:
            recipe: JSON scalars. Equal recipes have the same key.
            measured: JSON values. Their names differ from the recipe's.
            losses: nats per scored token, [tokens].

        Raises:
            DataError: as in `copy`.
        """
        shared = (recipe.keys() & measured.keys()) | ({"key"} & {*recipe, *measured})
        assert not shared, f"recipe and measured share {sorted(shared)}"
        return self.copy({"key": recipe_key(recipe), **_plain(recipe), **_plain(measured)}, losses)

    def copy(self, row: Row, losses: Losses | None) -> Row:
        """Write a complete row, for example of another run.

        Raises:
            DataError: the folder cannot be written, or the disk is full. Rows that were written
                before remain complete.
        """
        text = json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
        line = text.encode(errors="backslashreplace")  # half of a surrogate pair in a name, as JSON escapes it
        try:
            if losses is not None:
                buffer = io.BytesIO()
                np.save(buffer, np.asarray(losses, dtype=np.float32), allow_pickle=False)
                write_atomic(self._losses_file(row), buffer.getvalue())
            with self._lock, self._file.open("ab") as file:
                self.refresh()
                if not self._unended:
                    file.truncate(self._read)  # the incomplete line of a killed process
                file.write(b"\n" * self._unended + line)
                file.flush()
                os.fsync(file.fileno())
                self.refresh()
        except OSError as error:
            raise self._unwritable(error) from error
        return row

    def losses(self, row: Row) -> Losses | None:
        """The per-token losses of a row, or None if none were stored.

        Raises:
            DataError: the file exists and cannot be read.
        """
        file = self._losses_file(row)
        if not file.exists():
            return None
        try:
            losses: Losses = np.load(file, allow_pickle=False)
            if losses.dtype != np.float32 or losses.ndim != 1:
                raise ValueError(f"it holds {losses.dtype} {list(losses.shape)}, not float32 [tokens]")
        except Exception as error:  # numpy evaluates the header of a damaged file, so any error is possible
            raise DataError(f"{file} cannot be read ({error}); delete it and measure the cell again") from None
        return losses

    def write_environment(self, values: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
        """Write `values`, or else `environment()`, to env.json, and return them."""
        values = environment() if values is None else values
        try:
            write_atomic(self.folder / "env.json", (json.dumps(values, indent=2) + "\n").encode())
        except OSError as error:
            raise self._unwritable(error) from error
        return values

    def _unwritable(self, error: OSError) -> DataError:
        stored = (
            "Finished rows are stored, and the same command continues from there"
            if self._rows
            else "Nothing was stored"
        )
        return DataError(
            f"{self.folder} cannot be written ({error.strerror or error}); {_MENDS.get(error.errno, '')}give another "
            "folder (",
            Setting("out", "FOLDER"),
            f"). {stored}",
        )

    def _losses_file(self, row: Row) -> Path:
        return self.folder / "losses" / f"{row['key']}.npy"

    @contextmanager
    def claim(self, key: str) -> Iterator[bool]:
        """Reserve `key` for this process; false if another process holds it. Rows of other
        processes are then read."""
        file = self.folder / ".claims" / key
        lock = filelock.FileLock(file, timeout=0)
        try:
            file.parent.mkdir(exist_ok=True)
            lock.acquire()
        except filelock.Timeout:
            yield False
            return
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            self.refresh()
            yield True
        finally:
            file.unlink(missing_ok=True)  # a process that waits for this lock then sees the finished rows
            lock.release()

    def refresh(self) -> None:
        """Read the rows that other processes have added."""
        if not self._file.exists():
            return
        with self._file.open("rb") as file:
            file.seek(self._read)
            *lines, tail = file.read().split(b"\n")
        for line in lines:
            row = _parse(line)
            if row is None:
                number = self._lines + 1
                raise DataError(f"{self._file}, line {number} is damaged: {line[:60]!r}; delete that line to continue")
            self._rows[row["key"]] = row
            self._read += len(line) + 1
            self._lines += 1
        row = _parse(tail)
        self._unended = row is not None
        if row is not None:
            self._rows[row["key"]] = row


def open_run_of_rank(folder: Path) -> Run:
    """The run in `folder`. If a model is split over processes, every process except the first gets
    a temporary copy.

    All processes then see the same rows, and no row is written twice.
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


def recipe_key(recipe: Mapping[str, Any]) -> str:
    """12 hex digits of the sha256 of the recipe's canonical JSON. The order of its fields does not
    matter."""
    plain = _plain(recipe)
    scalars = (str, int, float, bool, type(None))
    assert all(isinstance(value, scalars) for value in plain.values()), f"a recipe holds JSON scalars: {plain}"
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def loss_text(row: Row, digits: int = 4) -> str:
    """`loss 3.5123`, or the reason for a missing loss."""
    return str(row.get("reason", "loss is not finite")) if row["loss"] is None else f"loss {row['loss']:.{digits}f}"


def environment() -> dict[str, Any]:
    """The environment of a measurement: versions, machine, threads and command."""
    import torch

    program = Path(sys.argv[0])
    name = program.parent.name if program.name == "__main__.py" else program.name
    return {
        **{package: importlib.metadata.version(package) for package in ("ropewalk", "torch", "transformers")},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "torch_threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "command": shlex.join([name, *sys.argv[1:]]),
    }


def environment_of(run: Run) -> dict[str, Any]:
    """What env.json of a run says; nothing if it is not there."""
    file = run.folder / "env.json"
    if not file.exists():
        return {}
    try:
        found: dict[str, Any] = dict(json.loads(file.read_bytes()))
    except (ValueError, TypeError, RecursionError):
        raise DataError(f"{file} is damaged; delete it, and the next run writes it anew") from None
    return found


def _parse(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    key = row.get("key") if isinstance(row, dict) else None
    return row if isinstance(key, str) and _KEY.fullmatch(key) else None


def _plain(value: Any) -> Any:
    """`value` as JSON can hold it. numpy scalars become Python's, numbers that are not finite
    become None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def open_run(folder: Path) -> Run:
    """Open an existing run.

    Raises:
        DataError: the folder holds no results, or a damaged row.
    """
    if not (folder / "results.jsonl").is_file():
        raise DataError(
            f"{folder} holds no results.jsonl, so it is not the folder of a run; give the folder that --out named"
        )
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
"""The types that the fields of a row may have."""

_NEEDED = ("protocol", "model", "rope", "text", "dtype", "context")


def _check(row: Row, folder: Path) -> None:
    """Refuse a damaged row. Tables and plots rely on these fields."""
    wrong = [key for key, kinds in _KINDS.items() if key in row and not isinstance(row[key], kinds)]
    if row.get("task") == "ppl":
        wrong += [key for key in _NEEDED if row.get(key) is None]
        if row.get("protocol") == "by-position":
            wrong += [key for key in ("bucket_start", "bucket_end") if row.get(key) is None]
    if wrong:
        raise DataError(
            f"{folder / 'results.jsonl'}: the row {row['key']!r} is damaged, {wrong[0]!r} is "
            f"{row.get(wrong[0])!r:.60}; delete its line to continue"
        )


def merge(runs: Sequence[Run], out: Path) -> Run:
    """Copy the rows, losses and environments of all runs into the folder `out`. If several runs have
    the same recipe, the last one counts."""
    merged = Run(out)
    found = [environment_of(run) for run in runs]
    names = dict.fromkeys(name for values in found for name in values)
    if names:
        merged.write_environment(
            {name: "; ".join(dict.fromkeys(str(values[name]) for values in found if name in values)) for name in names}
        )
    for run in runs:
        for row in run.rows:
            if merged.find_key(row["key"]) != row:
                merged.copy(row, run.losses(row))
    return merged
