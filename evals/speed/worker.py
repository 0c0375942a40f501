"""A timed engine, in its own process.

Each process has its own threads, memory and runtime libraries. Engines therefore do not slow each
other down, each has its own peak memory, and one that dies does not end the others. The time is
measured inside the process.
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
"""Environment variables of the thread counts. Libraries read them at import, so they are set
before."""


@dataclass(frozen=True, kw_only=True)
class TimedRun:
    """One timed run.

    Args:
        seconds: from the first token to the last logits.
        chosen: the likeliest next token after each logits of the run: one for a prefill, one per
            token for a decode.
        logits: the last logits, float32 [V].
    """

    seconds: float
    chosen: list[int]
    logits: Logits


class Worker(Protocol):
    """The interface of an engine in a comparison."""

    name: str
    dtype: str
    cache_dtype: str
    versions: dict[str, str]

    def prefill(self, ids: list[int]) -> TimedRun:
        """Read `ids` with an empty cache."""
        ...

    def decode(self, length: int, tokens: list[int]) -> TimedRun:
        """Read `tokens` one by one after the first `length` tokens of what was read."""
        ...

    def peak_memory_mb(self) -> float | None:
        """Peak memory so far, MB (10^6 bytes), or None if it is unknown."""
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
        else:  # only torch counts the GPU's memory
            return None
        return None if math.isnan(peak) else peak


def _timed(run: Callable[[], list[Logits]]) -> TimedRun:
    started = time.perf_counter()
    rows = run()
    seconds = time.perf_counter() - started
    return TimedRun(seconds=seconds, chosen=[int(row.argmax()) for row in rows], logits=rows[-1])


class ProcessWorker:
    """A worker in its own process, which ends with the `with` block.

    Raises:
        RopewalkError: the engine cannot be loaded or fails, or its process dies.
    """

    def __init__(self, spec: EngineSpec) -> None:
        self._spec = spec
        spawn = multiprocessing.get_context("spawn")
        self._connection, child_connection = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(child_connection, spec), daemon=True)
        self._process.start()
        child_connection.close()
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
        timed: TimedRun = self._ask("decode", length, tokens, doing=f"decoding after {length} tokens")
        return timed

    def peak_memory_mb(self) -> float | None:
        peak: float | None = self._ask("peak_memory_mb", doing="measuring its memory")
        return peak

    def _ask(self, method: str, *arguments: Any, doing: str) -> Any:
        with contextlib.suppress(OSError):  # the process is dead: `_receive` reports it
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
    """The main function of the process: open the engine, then answer requests until the process is
    ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and ends this process
    os.environ.update(dict.fromkeys(THREADS, str(spec.threads)))
    try:
        worker = LocalWorker(open_engine(spec), spec)
        connection.send((worker.name, worker.dtype, worker.cache_dtype, worker.versions))
        while True:
            method, arguments = connection.recv()
            connection.send(getattr(worker, method)(*arguments))
    except EOFError:  # the parent has ended
        return
    except RopewalkError as error:
        connection.send(error)
    except Exception as error:  # another engine may raise anything
        reason = f"{type(error).__name__}: {str(error).strip()[:300]}"
        connection.send(RopewalkError(f"{spec.name} failed ({reason}); leave it out of --against"))
