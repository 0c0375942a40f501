"""The threads of the compiled kernels, which are those of torch."""

from __future__ import annotations

import os
import threading

import torch

_SPIN_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
_sleeping_threads: list[threading.Thread] = []


def use_threads() -> int:
    """Let the kernels use as many threads as torch does, and return their number."""
    import numba

    wanted = torch.get_num_threads()
    threads: int = min(wanted, numba.config.NUMBA_NUM_THREADS)
    if numba.get_num_threads() != threads:
        numba.set_num_threads(threads)
    if torch.get_num_threads() != wanted:  # the first call of numba gives OpenMP, and so torch, all cores
        torch.set_num_threads(wanted)
    return threads


def share_threads() -> int:
    """As `use_threads`, and idle threads sleep at once: for programs that spend their time in our kernels.

    Between two parallel regions, GNU OpenMP lets idle threads spin for about 10 ms. On a busy machine they take the
    cores of the threads that they wait for: next to one busy process, decoding fell from 36 to 9 tokens/s. If a
    process has more OpenMP threads than CPUs, idle threads spin for a few microseconds only (GOMP_SPINCOUNT in the
    manual of libgomp). So one extra set of threads is started, and it sleeps.

    Where torch computes the layers (vLLM), this would be slower: a step has hundreds of its parallel regions, and each
    would wake the threads again.
    """
    import numba

    threads = use_threads()
    if not _sleeping_threads and not any(name in os.environ for name in _SPIN_VARIABLES):
        _add_sleeping_threads(numba.config.NUMBA_NUM_THREADS)
    return threads


def _add_sleeping_threads(count: int) -> None:
    """Start `count` OpenMP threads that sleep from then on."""
    from .kernels import touch

    started = threading.Event()

    def sleep() -> None:
        import numba

        numba.set_num_threads(count)
        touch(count)
        started.set()
        threading.Event().wait()

    _sleeping_threads.append(threading.Thread(target=sleep, daemon=True, name="ropewalk: sleeping OpenMP threads"))
    _sleeping_threads[-1].start()
    started.wait()
