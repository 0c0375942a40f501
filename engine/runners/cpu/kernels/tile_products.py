"""The two products of attention with bfloat16 numbers: rows of keys or of values with the vectors of a tile.

Both operands are stored as pairs of neighbouring numbers, along the head of a key, or along the keys of values.
`vdpbf16ps` (AVX512-BF16) multiplies pairs of 16 lanes. AMX multiplies 16 rows with 16 lanes, 32 numbers deep. On other
CPUs two float32 products do the same, for tests.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import llvmlite.ir as ir
from numba.core import cgutils
from numba.extending import intrinsic

from .lanes import (
    I32,
    I64,
    INTEGERS,
    LANES,
    ROW,
    VECTOR,
    VECTORS,
    addresses,
    at,
    call_vector,
    floats,
    fma,
    integers,
    load,
    splat,
    store,
)
from .linear import target_has

ROWS = 4  # rows that are multiplied together: 4 x 4 sums stay in registers

_RUN = 64  # bytes of a row of values in a group
_I8 = ir.IntType(8)

HAS_BFLOAT16_PRODUCTS = target_has("avx512bf16")
"""True if this CPU multiplies pairs of bfloat16 numbers in one instruction."""

_HAS_AMX = target_has("amx-bf16") and sys.platform == "linux"


@cache
def may_use_amx() -> bool:
    """True if this CPU has AMX and the kernel lets this process use it."""
    request, system_call, tile_data = 0x1023, 158, 18  # arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
    return _HAS_AMX and ctypes.CDLL(None).syscall(system_call, request, tile_data) == 0


class _BFloat16(ir.Type):  # type: ignore[misc]
    """LLVM's `bfloat`, which llvmlite lacks."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat16)

    def __hash__(self) -> int:
        return hash(_BFloat16)


BFLOATS = ir.VectorType(_BFloat16(), 2 * LANES)


def _halves(b: ir.IRBuilder, pairs: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The first and the second bfloat16 number of each pair, as float32."""
    return (
        b.bitcast(b.shl(pairs, integers(16)), VECTOR),
        b.bitcast(b.and_(pairs, integers(0xFFFF0000)), VECTOR),
    )


def _add_products(b: ir.IRBuilder, total: ir.Value, x: ir.Value, y: ir.Value) -> ir.Value:
    """total + the products of two pairs of bfloat16 numbers, <16 x i32>, in each lane."""
    if HAS_BFLOAT16_PRODUCTS:
        return call_vector(b, "llvm.x86.avx512bf16.dpbf16ps.512", total, b.bitcast(x, BFLOATS), b.bitcast(y, BFLOATS))
    (x_first, x_second), (y_first, y_second) = _halves(b, x), _halves(b, y)
    return fma(b, x_second, y_second, fma(b, x_first, y_first, total))


def _multiply(
    b: ir.IRBuilder, rows: Sequence[ir.Value], step: ir.Value, tile: ir.Value, pairs: ir.Value, sums: list[ir.Value]
) -> list[ir.Value]:
    """Add to `sums` [rows, vectors] the products of `pairs` pairs of every row with those of a tile.

    Args:
        rows: the addresses of the rows. 16 pairs are neighbours; the next 16 are `step` bytes from these.
        tile: the address of [pairs, 64] pairs.
    """
    places = [cgutils.alloca_once_value(b, x) for x in sums]
    with cgutils.for_range(b, pairs) as loop:
        run, within = b.lshr(loop.index, I64(4)), b.and_(loop.index, I64(15))
        offset = b.add(b.mul(run, step), b.shl(within, I64(2)))
        vectors = [load(b, at(b, tile, loop.index, k), INTEGERS) for k in range(VECTORS)]
        for r, row in enumerate(rows):
            pair = splat(b, load(b, b.add(row, offset), I32))
            for k, vector in enumerate(vectors):
                place = places[r * VECTORS + k]
                b.store(_add_products(b, b.load(place), pair, vector), place)
    return [b.load(place) for place in places]


@intrinsic
def scores_of(
    _context: Any, tile: Any, key_0: Any, key_1: Any, key_2: Any, key_3: Any, pairs: Any, out: Any
) -> tuple[Any, Callable[..., ir.Value]]:
    """Four rows of scores, for four keys."""

    def generate(b: ir.IRBuilder, tile: ir.Value, *rest: ir.Value) -> None:
        *keys, pairs, out = rest
        sums = _multiply(b, keys, I64(_RUN), tile, pairs, [floats(0)] * ROWS * VECTORS)
        for n, x in enumerate(sums):
            store(b, at(b, out, *divmod(n, VECTORS)), x)

    return addresses(7, generate)


@intrinsic
def add_values(
    _context: Any, weights: Any, values: Any, step: Any, pairs: Any, out: Any
) -> tuple[Any, Callable[..., ir.Value]]:
    """Add four numbers of each value times the weights to four rows of results."""

    def generate(b: ir.IRBuilder, weights: ir.Value, values: ir.Value, *rest: ir.Value) -> None:
        step, pairs, out = rest
        places = [at(b, out, *divmod(n, VECTORS)) for n in range(ROWS * VECTORS)]
        sums = [load(b, place) for place in places]
        rows = [b.add(values, I64(_RUN * r)) for r in range(ROWS)]
        for place, x in zip(places, _multiply(b, rows, step, weights, pairs, sums), strict=True):
            store(b, place, x)

    return addresses(5, generate)


# AMX


@intrinsic
def set_up_tiles(_context: Any) -> tuple[Any, Callable[..., ir.Value]]:
    """Let the eight tile registers of this thread have 16 rows of 64 bytes."""

    def generate(b: ir.IRBuilder) -> None:
        palette, bytes_of_rows, rows = [1] + [0] * 15, [64, 0] * 8 + [0] * 16, [16] * 8 + [0] * 8
        kind = ir.VectorType(_I8, 64)
        place = cgutils.alloca_once_value(b, ir.Constant(kind, palette + bytes_of_rows + rows))
        _amx(b, "ldtilecfg", b.bitcast(place, _I8.as_pointer()))

    return addresses(0, generate)


@intrinsic
def leave_tiles(_context: Any) -> tuple[Any, Callable[..., ir.Value]]:
    """Give the tile registers of this thread back."""
    return addresses(0, lambda b: _amx(b, "tilerelease"))


@intrinsic
def scores_in_tiles(
    _context: Any, tile: Any, keys: Any, key_stride: Any, groups: Any, out: Any
) -> tuple[Any, Callable[..., ir.Value]]:
    """32 rows of scores, for 32 keys whose heads have `groups` * 32 numbers."""

    def generate(b: ir.IRBuilder, tile: ir.Value, keys: ir.Value, *rest: ir.Value) -> None:
        key_stride, groups, out = rest
        _multiply_in_tiles(b, keys, key_stride, I64(_RUN), tile, groups, out, adds=False)

    return addresses(5, generate)


@intrinsic
def add_values_in_tiles(
    _context: Any, weights: Any, values: Any, step: Any, groups: Any, out: Any
) -> tuple[Any, Callable[..., ir.Value]]:
    """Add 32 numbers of the values in `groups` times the weights to 32 rows of results."""

    def generate(b: ir.IRBuilder, weights: ir.Value, values: ir.Value, *rest: ir.Value) -> None:
        step, groups, out = rest
        _multiply_in_tiles(b, values, I64(_RUN), step, weights, groups, out, adds=True)

    return addresses(5, generate)


def _multiply_in_tiles(
    b: ir.IRBuilder,
    rows: ir.Value,
    row_stride: ir.Value,
    step: ir.Value,
    tile: ir.Value,
    groups: ir.Value,
    out: ir.Value,
    adds: bool,
) -> None:
    """The products of 32 rows, `groups` * 32 numbers deep, with those of a tile.

    Args:
        rows: the address of the first row; the next is `row_stride` bytes on, and the next 32 numbers `step` bytes.
        tile: the address of [groups * 16, 64] pairs.
        out: the address of float32 [32, 64].
        adds: whether the products are added to `out`.
    """
    sums, (top, bottom), (left, right) = range(4), (4, 5), (6, 7)
    for half in range(2):  # of the lanes
        places = [at(b, out, LANES * (n // 2), 2 * half + n % 2) for n in sums]
        for n, place in enumerate(places):
            if adds:
                _amx(b, "tileloadd64", n, place, I64(ROW))
            else:
                _amx(b, "tilezero", n)
        with cgutils.for_range(b, groups) as loop:
            row = b.add(rows, b.mul(loop.index, step))
            _amx(b, "tileloadd64", top, row, row_stride)
            _amx(b, "tileloadd64", bottom, b.add(row, b.mul(row_stride, I64(LANES))), row_stride)
            for column, register in enumerate((left, right)):
                place = at(b, tile, b.mul(loop.index, I64(LANES)), 2 * half + column)
                _amx(b, "tileloadd64", register, place, I64(ROW))
            for n, (x, y) in enumerate(((top, left), (top, right), (bottom, left), (bottom, right))):
                _amx(b, "tdpbf16ps", n, x, y)
        for n, place in enumerate(places):
            _amx(b, "tilestored64", n, place, I64(ROW))


def _amx(b: ir.IRBuilder, name: str, *args: ir.Value | int) -> None:
    """An instruction of AMX; integers are tile registers."""
    if not _HAS_AMX:  # the CPU will not get here, but its LLVM would refuse to compile it
        return
    values = [ir.Constant(_I8, x) if isinstance(x, int) else x for x in args]
    if name in ("tileloadd64", "tilestored64"):
        values[1] = b.inttoptr(values[1], _I8.as_pointer())
    kind = ir.FunctionType(ir.VoidType(), [x.type for x in values])
    b.call(cgutils.get_or_insert_function(b.module, kind, f"llvm.x86.{name}"), values)
