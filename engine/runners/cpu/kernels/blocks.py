"""Products with weights in the blocks of a GGUF file, and the weights themselves as float32 or bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import llvmlite.ir as ir
import numpy as np
from numba import carray, cfunc, njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from .block_formats import BLOCKS, NUMBERS, PART, BlockFormat, BlockReader, floats, load_from, shuffle
from .folder import cached_in_folder
from .linear import project_rows, rows_of
from .simd import F32, INTEGERS, VECTOR, WIDTH, call_llvm, fetch, get, reduced, size_of

_AHEAD = 4096  # blocks are prefetched this many bytes before their use

_I16, _I64 = ir.IntType(16), ir.IntType(64)


def _store(b: ir.IRBuilder, address: ir.Value, x: ir.Value) -> None:
    b.store(x, b.inttoptr(address, x.type.as_pointer()), align=2)


def _bfloat16(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """The bits of finite numbers rounded to bfloat16, ties to even."""
    upper, one, half = (ir.Constant(INTEGERS, [n] * WIDTH) for n in (16, 1, 0x7FFF))
    bits = b.bitcast(x, INTEGERS)
    odd = b.and_(b.lshr(bits, upper), one)
    return b.trunc(b.lshr(b.add(b.add(bits, half), odd), upper), ir.VectorType(_I16, WIDTH))


def _sum(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    return reduced(b, x, lambda b, low, high: b.fadd(low, high))


def _dot_blocks(b: ir.IRBuilder, format_: BlockFormat, tokens: int, args: Any) -> list[ir.Value]:
    """The products of two rows and `tokens` consecutive vectors, in the same order of sums for any number of tokens."""
    _, row, row_stride, x, arranged, columns = args
    totals = [cgutils.alloca_once(b, VECTOR) for _ in range(2 * tokens)]
    lows = [cgutils.alloca_once(b, VECTOR) for _ in range(2 * tokens)]
    for place in (*totals, *lows):
        b.store(floats(0), place)

    bytes_of_x = b.mul(columns, _I64(4))
    start, stride = x, bytes_of_x
    if not format_.in_order:
        start, stride = arranged, b.add(b.add(bytes_of_x, columns), b.udiv(columns, _I64(8)))
    with cgutils.for_range(b, b.udiv(columns, _I64(format_.weights))) as loop:
        block = b.add(row, b.mul(loop.index, _I64(format_.size)))
        first = b.add(start, b.mul(loop.index, _I64(4 * format_.weights)))
        first_sum = b.add(b.add(start, bytes_of_x), b.mul(loop.index, _I64(format_.weights)))
        first_part_sum = b.add(b.add(start, b.add(bytes_of_x, columns)), b.mul(loop.index, _I64(format_.weights // 8)))
        two = (format_.parts(BlockReader(b, address)) for address in (block, b.add(block, row_stride)))
        for n, parts in enumerate(zip(*two, strict=True)):
            for r, part in enumerate(parts):
                quants = [part.in_order(b, k) if format_.in_order else part.in_place(b, k) for k in range(4)]
                for t in range(tokens):
                    offset = b.mul(stride, _I64(t))
                    sums = b.add(b.add(first_sum, offset), _I64(PART * n))
                    total = None
                    if part.offset:
                        total = b.fmul(load_from(b, sums, VECTOR), floats(-part.offset))
                    for k, quant in enumerate(quants):
                        vector = load_from(b, b.add(b.add(first, offset), _I64(4 * (PART * n + 8 * k))), VECTOR)
                        total = b.fmul(quant, vector) if total is None else call_llvm(b, "fma", quant, vector, total)
                    place = r * tokens + t
                    b.store(call_llvm(b, "fma", part.scale, total, b.load(totals[place])), totals[place])
                    if part.lows is not None and n == 0:
                        sums = b.add(first_part_sum, offset)
                        b.store(
                            call_llvm(b, "fma", part.lows, load_from(b, sums, VECTOR), b.load(lows[place])), lows[place]
                        )
                    elif part.lows is None and part.low is not None:
                        b.store(
                            call_llvm(b, "fma", part.low, load_from(b, sums, VECTOR), b.load(lows[place])), lows[place]
                        )

    return [_sum(b, b.fadd(b.load(total), b.load(low))) for total, low in zip(totals, lows, strict=True)]


def _dot_of(tokens: int) -> Any:
    """A function of numba: two rows of blocks times `tokens` consecutive vectors, the products of the first row first.

    A product has the same bits for any number of vectors. `code` is the ggml type of the blocks, a constant.
    """

    def dot(
        _context: Any, code: Any, row: Any, row_stride: Any, x: Any, arranged: Any, columns: Any
    ) -> tuple[Any, Callable[..., ir.Value]]:
        format_ = BLOCKS[code.literal_value]

        def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
            return context.make_tuple(builder, signature.return_type, _dot_blocks(builder, format_, tokens, args))

        return types.UniTuple(types.float32, 2 * tokens)(code, *[types.int64] * 5), generate

    return intrinsic(prefer_literal=True)(dot)


dot, dot_4 = _dot_of(1), _dot_of(4)


@intrinsic(prefer_literal=True)
def _unpack_row(
    _context: Any, code: Any, kind: Any, row: Any, columns: Any, out: Any
) -> tuple[Any, Callable[..., ir.Value]]:
    """Write the weights of a row of blocks to an address, as `kind`: np.float32, or np.uint16 for bfloat16."""
    format_, size = BLOCKS[code.literal_value], kind.dtype.bitwidth // 8

    def generate(context: Any, b: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
        _, _, row, columns, out = args
        with cgutils.for_range(b, b.udiv(columns, _I64(format_.weights))) as loop:
            block = BlockReader(b, b.add(row, b.mul(loop.index, _I64(format_.size))))
            first = b.add(out, b.mul(loop.index, _I64(size * format_.weights)))
            for n, part in enumerate(format_.parts(block)):
                for k in range(4):
                    weights = part.weights(b, k)
                    stored = weights if kind.dtype == types.float32 else _bfloat16(b, weights)
                    _store(b, b.add(first, _I64(size * (PART * n + 8 * k))), stored)
        return context.get_dummy_value()

    return types.void(code, kind, *[types.int64] * 3), generate


@intrinsic
def _arrange_part(_context: Any, x: Any, out: Any, sums: Any, part_sum: Any) -> tuple[Any, Callable[..., ir.Value]]:
    """Write 32 numbers in the order in which a part is read, the sums of each lane, and their sum."""

    def generate(context: Any, b: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
        x, out, sums, part_sum = args
        numbers, total = load_from(b, x, ir.VectorType(F32, PART)), None
        for k in range(4):
            lane = shuffle(b, numbers, range(k, PART, 4))
            total = lane if total is None else b.fadd(total, lane)
            _store(b, b.add(out, _I64(32 * k)), b.fmul(lane, floats(2.0 ** (-8 * k))))
        _store(b, sums, total)
        _store(b, part_sum, _sum(b, total))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


def arrange(kind, x):
    """x [n, columns] as `project_any` takes it besides x itself. For other kinds than np.uint8 it is x.

    Returns:
        Float32 [n, columns + columns / 4 + columns / 32]: the numbers of each part in the order in which its quants are
        read, then the sums of its lanes, then its sum.
    """


@overload(arrange)
def _arrange(kind, x):
    if kind.dtype != types.uint8:
        return lambda kind, x: x

    def arranged(kind, x):
        n, columns = x.shape
        out = np.empty((n, columns + columns // 4 + columns // 32), np.float32)
        for t in range(n):
            source, target = x[t].ctypes.data, out[t].ctypes.data
            lanes, parts = target + 4 * columns, target + 5 * columns
            for part in range(columns // PART):
                _arrange_part(source + 128 * part, target + 128 * part, lanes + 32 * part, parts + 4 * part)
        return out

    return arranged


def _product(code):
    """The source of a kernel that multiplies the rows [start, stop) of a matrix of one format."""
    if code in NUMBERS:
        kind = NUMBERS[code]

        def numbers(linear, x, arranged, tokens, start, stop, out, out_columns, offset):
            table, target = carray(linear, 5), carray(out, (tokens, out_columns))
            project_rows(kind, table, x, tokens, start, stop, target, offset)

        return numbers

    def blocks(linear, x, arranged, tokens, start, stop, out, out_columns, offset):
        data, bias, columns, row_bytes = linear[0], linear[2], linear[4], linear[5]
        target = carray(out, (tokens, out_columns))
        x_size, arranged_size = 4 * columns, 5 * columns + columns // 8
        for r in range(start, stop, 2):
            row, second = data + r * row_bytes, min(r + 1, stop - 1)
            stride = (second - r) * row_bytes
            fetch(np.uint8, row, _AHEAD, 2 * row_bytes)
            shift, second_shift = (get(bias, r), get(bias, second)) if bias else (np.float32(0), np.float32(0))
            t, column, second_column = 0, offset + r, offset + second
            while t + 4 <= tokens:
                products = dot_4(code, row, stride, x + t * x_size, arranged + t * arranged_size, columns)
                for k in range(4):
                    target[t + k, column] = products[k] + shift
                    target[t + k, second_column] = products[4 + k] + second_shift
                t += 4
            while t < tokens:
                a, b = dot(code, row, stride, x + t * x_size, arranged + t * arranged_size, columns)
                target[t, column], target[t, second_column] = a + shift, b + second_shift
                t += 1

    return blocks


def _unpacker(code, kind):
    """The source of a kernel that unpacks the rows [start, stop) of a matrix of one format to one kind of numbers."""

    def rows(data, row_bytes, columns, start, stop, out):
        for r in range(start, stop):
            _unpack_row(code, kind, data + r * row_bytes, columns, out + size_of(kind) * r * columns)

    return rows


_PRODUCT = types.void(
    types.CPointer(types.int64), *[types.int64] * 5, types.CPointer(types.float32), types.int64, types.int64
)
_UNPACKER = types.void(*[types.int64] * 6)


@cache
def _compiled(source, signature, *of):
    with cached_in_folder():
        return cfunc(signature, cache=True)(source(*of))


def product(code: int) -> int:
    """The address of the kernel that multiplies by weights of a ggml type. It is compiled for the first matrix.

    Kernels are called by address: numba would compile one that it can see again for each of its callers.
    """
    return int(_compiled(_product, _PRODUCT, code).address)


@intrinsic
def _call(_context: Any, address: Any, arguments: Any) -> tuple[Any, Callable[..., ir.Value]]:
    """Call the function at an address with 64-bit integers."""

    def generate(context: Any, b: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
        values = cgutils.unpack_tuple(b, args[1])
        kind = ir.FunctionType(ir.VoidType(), [_I64] * len(values))
        b.call(b.inttoptr(args[0], kind.as_pointer()), values)
        return context.get_dummy_value()

    return types.void(types.int64, arguments), generate


@njit(parallel=True, cache=True)
def _unpack(kernel, data, rows, row_bytes, columns, out, threads):
    for p in prange(threads):
        start, stop = rows_of(p, threads, rows)
        _call(kernel, (data, row_bytes, columns, start, stop, out))


def unpack(code: int, kind: type, data: int, rows: int, row_bytes: int, columns: int, out: int, threads: int) -> None:
    """Write the weights of blocks of a ggml type at address `data` to address `out`, [rows, columns].

    Args:
        kind: of the numbers written: np.float32, or np.uint16 for bfloat16, rounded to nearest, ties to even.
    """
    _unpack(_compiled(_unpacker, _UNPACKER, code, kind).address, data, rows, row_bytes, columns, out, threads)


def project_any(kind, linear, x, arranged, tokens, start, stop, out, offset):
    """`project_rows` for any kind of weights. For np.uint8 each matrix has a format of its own.

    Args:
        linear: int64 [7]: as in `project_rows`, then the bytes of a row and the `product` of the format.
        arranged: the address of the result of `arrange`.
    """


@overload(project_any)
def _project_any(kind, linear, x, arranged, tokens, start, stop, out, offset):
    if kind.dtype != types.uint8:

        def plain(kind, linear, x, arranged, tokens, start, stop, out, offset):
            project_rows(kind, linear, x, tokens, start, stop, out, offset)

        return plain

    def packed(kind, linear, x, arranged, tokens, start, stop, out, offset):
        target = out.ctypes.data, out.shape[1], offset
        _call(linear[6], (linear.ctypes.data, x, arranged, tokens, start, stop, *target))

    return packed
