"""Vectors of a tile in LLVM's code. A row of a tile has one number for each of its 64 queries, as four vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.ir as ir
import numpy as np
from numba import types
from numba.core import cgutils

from .block_formats import load_from, shuffle

TILE = 64  # queries
GROUP = 32  # keys whose values are stored together
LANES = 16
VECTORS = TILE // LANES

F32, I32, I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
VECTOR, INTEGERS = (ir.VectorType(kind, LANES) for kind in (F32, I32))
ROW = 4 * TILE  # bytes


def at(b: ir.IRBuilder, address: ir.Value, row: ir.Value | int, vector: int) -> ir.Value:
    """The address of a vector of a row of a tile."""
    row = I64(row) if isinstance(row, int) else row
    return b.add(address, b.add(b.mul(row, I64(ROW)), I64(4 * LANES * vector)))


def load(b: ir.IRBuilder, address: ir.Value, kind: ir.Type = VECTOR) -> ir.Value:
    return load_from(b, address, kind)


def store(b: ir.IRBuilder, address: ir.Value, x: ir.Value) -> None:
    b.store(x, b.inttoptr(address, x.type.as_pointer()), align=1)


def floats(x: float) -> ir.Constant:
    return ir.Constant(VECTOR, [float(np.float32(x))] * LANES)


def integers(x: int) -> ir.Constant:
    return ir.Constant(INTEGERS, [x] * LANES)


def splat(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    kind = ir.VectorType(x.type, LANES)
    return shuffle(b, b.insert_element(ir.Constant(kind, ir.Undefined), x, I32(0)), [0] * LANES)


def call_vector(b: ir.IRBuilder, name: str, *args: ir.Value, kind: ir.Type = VECTOR) -> ir.Value:
    """The vector that a function of LLVM returns."""
    function = ir.FunctionType(kind, [x.type for x in args])
    return b.call(cgutils.get_or_insert_function(b.module, function, name), args)


def maximum(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    """The larger one, in one instruction: `y` where `x` is no number."""
    return b.select(b.fcmp_ordered(">", x, y), x, y)


def fma(b: ir.IRBuilder, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    return call_vector(b, "llvm.fma.v16f32", x, y, z)


def addresses(count: int, generate: Callable[..., None]) -> tuple[Any, Callable[..., ir.Value]]:
    """The type and the code of an intrinsic that takes addresses and counts, int64, and returns nothing."""

    def code(context: Any, b: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
        generate(b, *args)
        return context.get_dummy_value()

    return types.void(*[types.int64] * count), code
