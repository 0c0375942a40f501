"""An engine under a stopwatch, in a process of its own.

Each process has its own threads, memory and runtime libraries, so engines do not slow one another
down, the peak memory of each is its own, and one that dies does not end the others. The clock is
read inside the process.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol

from ...errors import RopewalkError
from .engine import Engine, EngineSpec, Logits, open_engine

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
"""Read by the libraries when they are imported, so set before."""


@dataclass(frozen=True, kw_only=True)
class TimedRun:
    """One timed run.

    Args:
        seconds: from the first token to the last logits.
        chosen: the likeliest next token after every logits that the run gave: one of a prefill, one
            for each token of a decode.
        logits: the last ones, float32 [V].
    """

    seconds: float
    chosen: list[int]
    logits: Logits


class Worker(Protocol):
    """What a comparison needs of an engine."""

    name: str
    dtype: str
    cache_dtype: str
    versions: dict[str, str]

    def prefill(self, ids: list[int]) -> TimedRun:
        """Read `ids` with nothing before them."""
        ...

    def decode(self, length: int, tokens: list[int]) -> TimedRun:
        """Read `tokens` one by one behind the first `length` tokens of what was read."""
        ...

    def peak_memory_mb(self) -> float | None:
        """Most memory held so far, MB (10^6 bytes), or None where it cannot be known."""
        ...


class LocalWorker:
    """An engine timed in its own process."""

    def __init__(self, engine: Engine, spec: EngineSpec) -> None:
        self._engine, self._spec = engine, spec
        self.name, self.versions = f"{spec.kind} {engine.dtype} {engine.remark}".rstrip(), engine.versions
        self.dtype, self.cache_dtype = engine.dtype, engine.cache_dtype

    def prefill(self, ids: list[int]) -> TimedRun:
        return _timed(lambda: [self._engine.prefill(ids)])

    def decode(self, length: int, tokens: list[int]) -> TimedRun:
        self._engine.rewind(length)
        return _timed(lambda: [self._engine.step(token) for token in tokens])

    def peak_memory_mb(self) -> float | None:
        from .memory import peak_memory_mb, peak_resident_mb

        if self._spec.device == "cpu":
            peak = peak_resident_mb()
        elif self._spec.kind != "llama.cpp":
            peak = peak_memory_mb()
        else:  # the GPU's memory is torch's to count
            return None
        return None if math.isnan(peak) else peak


def _timed(run: Callable[[], list[Logits]]) -> TimedRun:
    started = time.perf_counter()
    rows = run()
    seconds = time.perf_counter() - started
    return TimedRun(seconds=seconds, chosen=[int(row.argmax()) for row in rows], logits=rows[-1])


class ProcessWorker:
    """A worker in a process of its own, which ends with the `with` block.

    Raises:
        RopewalkError: the engine cannot be loaded, fails, or its process dies.
    """

    def __init__(self, spec: EngineSpec) -> None:
        self._spec = spec
        spawn = multiprocessing.get_context("spawn")
        self._connection, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(theirs, spec), daemon=True)
        self._process.start()
        theirs.close()
        try:
            self.name, self.dtype, self.cache_dtype, self.versions = self._receive("loading")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> ProcessWorker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.join()
        self._connection.close()

    def prefill(self, ids: list[int]) -> TimedRun:
        timed: TimedRun = self._ask("prefill", ids, doing=f"reading {len(ids)} tokens")
        return timed

    def decode(self, length: int, tokens: list[int]) -> TimedRun:
        timed: TimedRun = self._ask("decode", length, tokens, doing=f"decoding behind {length} tokens")
        return timed

    def peak_memory_mb(self) -> float | None:
        peak: float | None = self._ask("peak_memory_mb", doing="telling its memory")
        return peak

    def _ask(self, method: str, *arguments: Any, doing: str) -> Any:
        with contextlib.suppress(OSError):  # of a dead process: receiving tells how it died
            self._connection.send((method, arguments))
        return self._receive(doing)

    def _receive(self, doing: str) -> Any:
        try:
            answer = self._connection.recv()
        except (EOFError, OSError):
            self._process.join()
            raise RopewalkError(
                f"{self._spec.name} died while {doing} (exit code {self._process.exitcode}); leave it out of "
                "--against, or try shorter --lengths"
            ) from None
        if isinstance(answer, Exception):
            raise answer
        return answer


def _serve(connection: Connection, spec: EngineSpec) -> None:
    """The other process: open the engine, then answer questions until it is ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    os.environ.update(dict.fromkeys(THREADS, str(spec.threads)))
    try:
        worker = LocalWorker(open_engine(spec), spec)
        connection.send((worker.name, worker.dtype, worker.cache_dtype, worker.versions))
        while True:
            method, arguments = connection.recv()
            connection.send(getattr(worker, method)(*arguments))
    except EOFError:  # the parent is gone
        return
    except RopewalkError as error:
        connection.send(error)
    except Exception as error:  # of a foreign engine: anything
        reason = f"{type(error).__name__}: {str(error).strip()[:300]}"
        connection.send(RopewalkError(f"{spec.name} failed ({reason}); leave it out of --against"))
