"""The threads of the kernels: as many as torch uses, and asleep soon after they have nothing to do.

A step of decoding is about a hundred parallel regions. GNU OpenMP lets a thread that waits for the next one spin for
some 10 ms. On a busy machine it spins on the core that the thread it waits for needs: decoding fell from 36 tokens/s
to 9 beside one busy process. Where a process has more OpenMP threads than CPUs, each of them spins for a few
microseconds only (GOMP_SPINCOUNT in the manual of libgomp), and nothing but that is needed.
"""

from __future__ import annotations

import os
import threading

import torch

_SPIN_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
_sleeping_threads: list[threading.Thread] = []


def share_threads() -> int:
    """Let the kernels use as many threads as torch does; their number."""
    import numba

    wanted = torch.get_num_threads()
    threads: int = min(wanted, numba.config.NUMBA_NUM_THREADS)
    numba.set_num_threads(threads)
    if torch.get_num_threads() != wanted:  # both use OpenMP, and numba's start gives it as many as there are cores
        torch.set_num_threads(wanted)
    if not _sleeping_threads and not any(name in os.environ for name in _SPIN_VARIABLES):
        _spin_shortly(numba.config.NUMBA_NUM_THREADS)
    return threads


def _spin_shortly(count: int) -> None:
    """Keep `count` OpenMP threads asleep beside those that work, so that there are more of them than CPUs."""
    from .kernels import touch

    made = threading.Event()

    def keep() -> None:
        import numba

        numba.set_num_threads(count)
        touch(count)
        made.set()
        threading.Event().wait()

    _sleeping_threads.append(threading.Thread(target=keep, daemon=True, name="ropewalk: OpenMP threads kept asleep"))
    _sleeping_threads[-1].start()
    made.wait()
