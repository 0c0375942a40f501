"""Peak memory of this process, and of a process that scores one long text."""

from __future__ import annotations

import multiprocessing
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import RopewalkError


def peak_memory_mb() -> float:
    """Peak memory of this process so far, MB (10^6 bytes): of the GPU if there is one, else
    resident memory."""
    import torch

    return torch.cuda.max_memory_allocated() / 1e6 if torch.cuda.is_available() else peak_resident_mb()


def peak_resident_mb() -> float:
    """Peak resident memory so far, MB (10^6 bytes). Of mapped files, only the parts that were read
    count."""
    status = Path("/proc/self/status")
    if status.exists():  # the peak of getrusage includes the parent's before the fork
        match = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if match:
            return int(match[1]) * 1024 / 1e6
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


SCORED_TOKENS = 1024
"""Tokens at the end of the text that are scored."""


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Memory of one process that scored one text, MB (10^6 bytes).

    Args:
        imports: resident memory before the model was loaded.
        loaded: peak after the model was loaded.
        peak: peak at the end.
        weights, cache: their own sizes.
        loss: nats per token of the last `SCORED_TOKENS` tokens.
    """

    engine: str
    length: int
    seconds: float
    imports: float
    loaded: float
    peak: float
    weights: float
    cache: float
    loss: float

    @property
    def rest(self) -> float:
        """Memory besides weights and cache: libraries, buffers of a chunk, reserve of the
        allocator."""
        return self.peak - self.weights - self.cache


@dataclass(frozen=True)
class _Loaded:
    """An engine with its model: name, bytes of weights, bytes of keys and values, and a function
    that scores tokens."""

    name: str
    weights: int
    cache: int
    loss: Callable[[], float]


def _ropewalk(model: str, ids: list[int], dtype: str, rope: str) -> _Loaded:
    from ...engine.hf_model import weight_bytes
    from ...engine.load import load

    loaded = load(model, rope, dtype=dtype, max_length=len(ids))
    return _Loaded(
        f"ropewalk {loaded.precision}",
        weight_bytes(loaded.hf),
        loaded.bytes_per_token * len(ids),
        lambda: -float(loaded.score_ids(ids, len(ids) - SCORED_TOKENS).mean()),
    )


def _transformers(model: str, ids: list[int], dtype: str, _: str) -> _Loaded:
    """The loss of transformers' forward, as on its perplexity page: all logits at once."""
    import torch

    from ...engine.checkpoints.checkpoint import read_config, read_weights
    from ...engine.checkpoints.source import resolve
    from ...engine.hf_model import stored_dtype

    source = resolve(model)
    hf = read_weights(source, read_config(source), dtype=dtype if dtype == "auto" else getattr(torch, dtype))
    labels = torch.tensor([[-100] * (len(ids) - SCORED_TOKENS) + ids[-SCORED_TOKENS:]])

    def loss() -> float:
        with torch.inference_mode():
            return float(hf(torch.tensor([ids]), labels=labels, use_cache=False).loss)

    return _Loaded(f"transformers {stored_dtype(hf)}", hf.get_memory_footprint(), 0, loss)


_ENGINES = {"ropewalk": _ropewalk, "transformers": _transformers}


def _measure(engine: str, model: str, ids: list[int], dtype: str, rope: str, connection: Any) -> None:
    from ...engine import load  # noqa: F401  (so that torch and transformers count as libraries, not as loading)

    imports = peak_resident_mb()
    loaded = _ENGINES[engine](model, ids, dtype, rope)
    once_loaded, started = peak_resident_mb(), time.perf_counter()
    loss = loaded.loss()
    footprint = Footprint(
        engine=loaded.name,
        length=len(ids),
        seconds=time.perf_counter() - started,
        imports=imports,
        loaded=once_loaded,
        peak=peak_resident_mb(),
        weights=loaded.weights / 1e6,
        cache=loaded.cache / 1e6,
        loss=loss,
    )
    connection.send(footprint)


def measure_footprint(engine: str, model: str, ids: list[int], dtype: str, rope: str) -> Footprint:
    """Score `ids` in a new process, with the engine "ropewalk" or "transformers".

    Raises:
        RopewalkError: the process died, for example for lack of memory.
    """
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_measure, args=(engine, model, ids, dtype, rope, theirs))
    process.start()
    theirs.close()
    try:
        footprint: Footprint = ours.recv()
    except EOFError:
        process.join()
        raise RopewalkError(
            f"{engine} died at {len(ids)} tokens (exit code {process.exitcode}); try shorter --lengths"
        ) from None
    process.join()
    return footprint
