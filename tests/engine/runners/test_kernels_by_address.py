"""Kernels called by their address: they get the arrays that they declare, and compiling them changes nothing else."""

import gc

import numpy as np
import pytest
from numba import float32, int64

from ropewalk.engine.runners.cpu.kernels.by_address import Arguments, compiled

SUMS = Arguments(x=float32[:, :, ::1], out=int64[::1])
arrays_at = SUMS.arrays_at


def add_rows(thread, threads, address):
    a = arrays_at(address)
    for row in range(thread, len(a.out), threads):
        a.out[row] = a.x[row].sum()


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_share_the_arrays(threads):
    x, out = np.arange(42, dtype=np.float32).reshape(7, 3, 2), np.zeros(7, np.int64)
    SUMS.run(add_rows, threads, x=x, out=out)
    assert (out == x.sum((1, 2))).all()


@pytest.mark.parametrize(
    "x",
    [np.zeros((2, 3, 4)), np.zeros((2, 3), np.float32), np.zeros((2, 3, 8), np.float32)[:, :, ::2]],
    ids=["dtype", "dimensions", "not contiguous"],
)
def test_other_arrays_are_refused(x):
    with pytest.raises(TypeError, match="x must be contiguous float32 of 3 dimensions"):
        SUMS.run(add_rows, 1, x=x, out=np.zeros(2, np.int64))


def of_number(number):
    def kernel(address):
        address + number

    return kernel


@pytest.mark.parametrize("collects", [True, False])
def test_compiling_leaves_the_garbage_collector_as_it_was(collects):
    (gc.enable if collects else gc.disable)()
    try:
        compiled(of_number, 1 + collects)
        assert gc.isenabled() == collects
    finally:
        gc.enable()
