"""Threads that work together: nobody passes a barrier early, and a team that does not gather does nothing."""

import contextlib

import numba
import numpy as np
import pytest
import torch
from decoders import DECODERS, IDS, compiled
from kernel_data import from_python
from numba import njit, prange

from ropewalk.engine.runners.cpu import runner as runners
from ropewalk.engine.runners.cpu.kernels.team import FAILED, STATE, assemble, new_team, take, wait
from ropewalk.errors import RopewalkWarning


@njit(parallel=True)
def pass_around(threads, rounds, team, seen):
    """In every round each thread writes its own number and then reads that of the next thread."""
    board = np.zeros((threads, 64), np.int64)
    for thread in prange(threads):
        if assemble(team, threads):
            for n in range(rounds):
                board[thread, 0] = n + 1
                wait(team, threads)
                seen[thread] += board[(thread + 1) % threads, 0] == n + 1
                wait(team, threads)


@contextlib.contextmanager
def numba_threads(count):
    """numba with `count` threads. Its first call gives torch, too, a thread for every core: that is undone."""
    if count > numba.config.NUMBA_NUM_THREADS:
        pytest.skip(f"numba has {numba.config.NUMBA_NUM_THREADS} threads here")
    of_torch, before = torch.get_num_threads(), numba.get_num_threads()
    numba.set_num_threads(count)
    try:
        yield
    finally:
        numba.set_num_threads(before)
        torch.set_num_threads(of_torch)


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_every_thread_sees_what_the_others_wrote_before_a_barrier(threads):
    seen = np.zeros(threads, np.int64)
    with numba_threads(threads):
        pass_around(threads, 500, new_team(0), seen)
    assert (seen == 500).all()


@pytest.mark.parametrize(("count", "least", "threads"), [(0, 1, 2), (7, 1, 1), (960, 16, 2), (1001, 16, 3), (5, 16, 4)])
def test_ranges_that_are_taken_are_all_and_shrink(count, least, threads):
    team, taken = new_team(2), []
    while True:
        start, stop = from_python(take)(team, 1, count, least, threads)
        if start == stop:
            break
        taken.append((start, stop))
    assert [start for start, _ in taken] == [0, *(stop for _, stop in taken)][: len(taken)]
    assert not taken or taken[-1][1] == count
    sizes = [stop - start for start, stop in taken]
    assert all(size % least == 0 for size in sizes[:-1])
    assert sizes == sorted(sizes, reverse=True)
    if taken:
        assert sizes[0] <= max(count / (2 * threads), least)
    assert from_python(take)(team, 0, 1, 1, 1) == (0, 1)  # another piece of work


@njit(parallel=True)
def take_together(threads, count, team, seen):
    for _thread in prange(threads):
        if assemble(team, threads):
            start, stop = take(team, 0, count, 1, threads)
            while start < stop:
                for n in range(start, stop):
                    seen[n] += 1
                start, stop = take(team, 0, count, 1, threads)


@pytest.mark.parametrize("threads", [2, 4])
def test_threads_take_everything_once(threads):
    seen = np.zeros(100_000, np.int64)
    with numba_threads(threads):
        take_together(threads, len(seen), new_team(1), seen)
    assert (seen == 1).all()


def test_a_team_that_does_not_gather_is_given_up_by_all():
    team = new_team(0)
    assert not from_python(assemble)(team, 2)  # waits for a second thread, which does not come
    assert team[STATE] == FAILED
    assert not from_python(assemble)(team, 2)  # and comes too late


def test_a_step_without_enough_threads_runs_on_one_and_says_so(monkeypatch):
    runner = compiled(DECODERS["llama"]())
    ids = IDS[0, :3].tolist()
    expected = runner.forward(ids, runner.new_cache(8), 3)

    def too_few():
        numba.set_num_threads(1)
        return 2

    monkeypatch.setattr(runners, "share_threads", too_few)
    with pytest.warns(RopewalkWarning, match="2 threads of a step did not start together"):
        found = runner.forward(ids, runner.new_cache(8), 3)
    assert torch.equal(found, expected)
