"""Kernels that are called by their address: by other kernels, or by several threads together.

numba compiles a function again for each caller that sees it, and the body of a parallel region four times. A kernel
that is called by its address is compiled once.
"""

from __future__ import annotations

import gc
from collections import namedtuple
from collections.abc import Callable
from functools import cache
from typing import Any

import llvmlite.ir as ir
import numpy as np
from numba import cfunc, njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array
from numba.np.numpy_support import as_dtype

from .folder import cached_in_folder

_FIELDS = 6  # of an array in a table: its address, and up to five sizes

_I64 = ir.IntType(64)


def inner(function: Callable[..., Any]) -> Any:
    """Compile a function that only other kernels call, without what a call from Python needs."""
    return njit(cache=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)(function)


@cache
def compiled(function: Callable[..., Any], *of: Any) -> Any:
    """The compiled form of a function of 64-bit integers: `address`, and `ctypes` to call it.

    Args:
        of: if given, the function is `function(*of)`.
    """
    function = function(*of) if of else function
    signature = types.void(*[types.int64] * function.__code__.co_argcount)
    collects = gc.isenabled()
    gc.disable()  # numba makes millions of small objects beside torch's, which would be looked at again and again
    try:
        with cached_in_folder():
            return cfunc(signature, cache=True)(function)
    finally:
        if collects:
            gc.enable()


@intrinsic
def call(_context: Any, address: Any, arguments: Any) -> tuple[Any, Callable[..., ir.Value]]:
    """Call the function at an address with 64-bit integers."""

    def generate(context: Any, b: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
        values = cgutils.unpack_tuple(b, args[1])
        kind = ir.FunctionType(ir.VoidType(), [_I64] * len(values))
        b.call(b.inttoptr(args[0], kind.as_pointer()), values)
        return context.get_dummy_value()

    return types.void(types.int64, arguments), generate


@intrinsic
def pointer(_context: Any, kind: Any, address: Any) -> tuple[Any, Callable[..., ir.Value]]:
    """A pointer to numbers of `kind` at an address, for `carray`."""

    def generate(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return b.inttoptr(args[1], context.get_value_type(signature.return_type))

    return types.CPointer(kind.dtype)(kind, types.int64), generate


@njit(parallel=True, cache=True)
def _run(kernel, table, threads):
    for thread in prange(threads):
        call(kernel, (thread, threads, table))


def touch(count: int) -> None:
    """Run `count` threads that do nothing. It starts them."""
    _run(compiled(_nothing).address, 0, count)


def _nothing(thread, threads, table):
    pass


class Arguments:
    """The arrays that a kernel of several threads takes, by name.

    Args:
        kinds: their types in numba's notation.

    Attributes:
        arrays_at: a function of numba: the arrays whose table is at an address, as a named tuple.
    """

    def __init__(self, **kinds: Any) -> None:
        self._kinds = [(name, as_dtype(kind.dtype), kind.ndim) for name, kind in kinds.items()]
        self.arrays_at = _arrays_at_of(types.NamedTuple(list(kinds.values()), namedtuple("Arguments", kinds)))

    def run(self, kernel: Callable[..., Any], threads: int, **arrays: np.ndarray[Any, Any]) -> None:
        """Run kernel(thread, threads, address of the table) in `threads` threads."""
        table = np.zeros((len(self._kinds), _FIELDS), np.int64)
        for row, (name, dtype, dimensions) in zip(table, self._kinds, strict=True):
            array = arrays[name]
            if array.dtype != dtype or array.ndim != dimensions or not array.flags.c_contiguous:
                raise TypeError(f"{name} must be contiguous {dtype} of {dimensions} dimensions, not {array.dtype}")
            row[0], row[1 : 1 + dimensions] = array.ctypes.data, array.shape
        _run(compiled(kernel).address, table.ctypes.data, threads)


def _arrays_at_of(arguments: Any) -> Any:
    @intrinsic
    def arrays_at(_context: Any, address: Any) -> tuple[Any, Callable[..., ir.Value]]:
        def generate(context: Any, b: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
            table = b.inttoptr(args[0], _I64.as_pointer())
            arrays = []
            for n, kind in enumerate(arguments.types):
                address, *sizes = (b.load(b.gep(table, [_I64(_FIELDS * n + k)])) for k in range(1 + kind.ndim))
                item = _I64(kind.dtype.bitwidth // 8)
                strides = [item]
                for size in sizes[:0:-1]:
                    strides.insert(0, b.mul(size, strides[0]))
                array = context.make_array(kind)(context, b)
                data = b.inttoptr(address, context.get_data_type(kind.dtype).as_pointer())
                populate_array(array, data, sizes, strides, item, None)
                arrays.append(array._getvalue())
            return context.make_tuple(b, arguments, arrays)

        return arguments(types.int64), generate

    return arrays_at
