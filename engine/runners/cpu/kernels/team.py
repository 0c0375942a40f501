"""Threads that run one function together and wait for one another at barriers.

A parallel region of OpenMP for each part of a step would cost more than the parts: starting one takes 20 to 40 us where
idle threads sleep, and a step has 150. Here a step is one region, and a barrier takes less than a microsecond.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from typing import Any

import llvmlite.ir as ir
import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .by_address import inner

STATE, ARRIVED, TAKEN = 0, 8, 16  # of a team, on cache lines of their own
WAITING, COMPLETE, FAILED = range(3)  # states

# A thread that waits longer than this sleeps: where all cores are busy, it is run again sooner than one that spins.
_SPINS = 1000
_MOST_WAITS = 21_000  # more than a second, as a sleep takes 60 us or more

_I64 = ir.IntType(64)


def _place(b: ir.IRBuilder, address: ir.Value) -> ir.Value:
    return b.inttoptr(address, _I64.as_pointer())


@intrinsic
def _read(_context: Any, address: Any) -> tuple[Any, Callable[..., ir.Value]]:
    """The number at an address. What other threads wrote before they wrote it can be seen from then on."""

    def generate(_context: Any, b: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
        return b.load_atomic(_place(b, args[0]), "acquire", 8)

    return types.int64(types.int64), generate


@intrinsic
def _count(_context: Any, address: Any) -> tuple[Any, Callable[..., ir.Value]]:
    """Add one to the number at an address, and return what it was."""

    def generate(_context: Any, b: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
        return b.atomic_rmw("add", _place(b, args[0]), _I64(1), "acq_rel")

    return types.int64(types.int64), generate


@intrinsic
def _change(_context: Any, address: Any, before: Any, after: Any) -> tuple[Any, Callable[..., ir.Value]]:
    """Change the number at an address if it is `before`, and return what it was."""

    def generate(_context: Any, b: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
        both = b.cmpxchg(_place(b, args[0]), args[1], args[2], "acq_rel", "acquire")
        return b.extract_value(both, 0)

    return types.int64(*[types.int64] * 3), generate


@intrinsic
def _pause(_context: Any) -> tuple[Any, Callable[..., ir.Value]]:
    """Tell the CPU that this thread is waiting."""

    def generate(context: Any, b: ir.IRBuilder, _signature: Any, _args: Any) -> ir.Value:
        if platform.machine().lower() in ("x86_64", "amd64"):
            kind = ir.FunctionType(ir.VoidType(), [])
            b.call(cgutils.get_or_insert_function(b.module, kind, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def _sleep(_context: Any) -> tuple[Any, Callable[..., ir.Value]]:
    """Sleep as shortly as the system can."""

    def generate(context: Any, b: ir.IRBuilder, _signature: Any, _args: Any) -> ir.Value:
        name, unit = ("usleep", 1) if os.name == "posix" else ("Sleep", 1)
        kind = ir.FunctionType(ir.IntType(32), [ir.IntType(32)])
        b.call(cgutils.get_or_insert_function(b.module, kind, name), [ir.IntType(32)(unit)])
        return context.get_dummy_value()

    return types.void(), generate


@inner
def _hold(waits):
    if waits > _SPINS:
        _sleep()
    else:
        _pause()


def new_team(works: int) -> np.ndarray[Any, Any]:
    """A team that shares `works` pieces of work, one after the other."""
    return np.zeros(TAKEN + 8 * works, np.int64)


@inner
def take(team, work, count, least, threads):
    """The next range [start, stop) of `count` things that no thread has taken; empty if all are.

    Ranges shrink from a part of what is left to `least`: cores are rarely equally fast, and none should wait long.
    """
    place = team.ctypes.data + 8 * (TAKEN + 8 * work)
    start = _read(place)
    while start < count:
        size = max((count - start) // (2 * threads * least), 1) * least
        stop = min(start + size, count)
        before = _change(place, start, stop)
        if before == start:
            return start, stop
        start = before
    return count, count


@inner
def assemble(team, threads):
    """Wait until all threads of a team are here.

    Returns:
        False if they do not come for a second, since fewer threads run than were asked for. Then none may go on.
    """
    state = team.ctypes.data
    if _count(state + 8 * ARRIVED) == threads - 1:
        return _change(state, WAITING, COMPLETE) == WAITING
    waits = 0
    while _read(state) == WAITING:
        waits += 1
        if waits > _MOST_WAITS:
            _change(state, WAITING, FAILED)
        _hold(waits)
    return _read(state) == COMPLETE


@inner
def wait(team, threads):
    """Wait until all threads of a team are here, and see what they wrote before."""
    arrived = team.ctypes.data + 8 * ARRIVED
    goal = (_count(arrived) // threads + 1) * threads
    waits = 0
    while _read(arrived) < goal:
        waits += 1
        _hold(waits)
