"""Products with weights in the blocks of a GGUF file, and the weights themselves as float32 or bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import llvmlite.ir as ir
import numpy as np
from numba import carray, int64, types
from numba.core import cgutils
from numba.extending import intrinsic

from .block_formats import BLOCKS, LANES, NUMBERS, PART, SHORTS, BlockFormat, BlockReader, floats, shuffle
from .by_address import Arguments, call, compiled, inner, pointer
from .linear import project_rows, rows_of
from .simd import F32, I32, INTEGERS, VECTOR, WIDTH, call_llvm, fetch, get, reduced, size_of

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


def _add_products(b: ir.IRBuilder, x: ir.Value, y: ir.Value, total: ir.Value | None) -> ir.Value:
    """The sums of two products of <16 x i16> and <16 x i16>, as <8 x i32>, plus `total`."""
    wide = ir.VectorType(I32, LANES)
    products = b.mul(b.sext(x, wide), b.sext(y, wide))
    pairs = b.add(shuffle(b, products, range(0, LANES, 2)), shuffle(b, products, range(1, LANES, 2)))
    return pairs if total is None else b.add(total, pairs)


def _dot_blocks(b: ir.IRBuilder, format_: BlockFormat, tokens: int, args: Any) -> list[ir.Value]:
    """The products of two rows and `tokens` consecutive vectors, in the same order of sums for any number of tokens."""
    _, row, row_stride, x, columns = args
    totals = [cgutils.alloca_once_value(b, floats(0)) for _ in range(2 * tokens)]
    lows = [cgutils.alloca_once_value(b, floats(0)) for _ in range(2 * tokens)]
    scales = b.add(x, b.mul(columns, _I64(2)))
    sums = b.add(scales, b.udiv(columns, _I64(8)))
    stride = b.add(b.mul(columns, _I64(2)), b.udiv(columns, _I64(4)))
    with cgutils.for_range(b, b.udiv(columns, _I64(format_.weights))) as loop:
        block = b.add(row, b.mul(loop.index, _I64(format_.size)))
        two = (format_.parts(BlockReader(b, address)) for address in (block, b.add(block, row_stride)))
        for n, parts in enumerate(zip(*two, strict=True)):
            of_part = b.add(b.mul(loop.index, _I64(format_.weights // PART)), _I64(n))
            rows = [(part, part.integers(b)) for part in parts]
            for t in range(tokens):
                offset = b.mul(stride, _I64(t))
                vector = BlockReader(b, b.add(b.add(x, offset), b.mul(of_part, _I64(2 * PART))))
                halves = [vector.read(2 * LANES * k, SHORTS) for k in range(2)]
                of_number = b.add(offset, b.mul(of_part, _I64(4)))
                scale = BlockReader(b, b.add(scales, of_number))
                summed = BlockReader(b, b.add(sums, of_number))
                for r, (part, quants) in enumerate(rows):
                    total, low = totals[r * tokens + t], lows[r * tokens + t]
                    products = None
                    for k in range(2):
                        products = _add_products(b, quants[k], halves[k], products)
                    factor = b.fmul(part.scale, scale.splat(scale.read(0, F32)))
                    b.store(call_llvm(b, "fma", b.sitofp(products, VECTOR), factor, b.load(total)), total)
                    if part.lows is not None and n == 0:
                        b.store(call_llvm(b, "fma", part.lows, summed.read(0, VECTOR), b.load(low)), low)
                    elif part.lows is None and part.low is not None:
                        each = b.fmul(summed.splat(summed.read(0, F32)), floats(1 / WIDTH))
                        b.store(call_llvm(b, "fma", part.low, each, b.load(low)), low)
    return [_sum(b, b.fadd(b.load(total), b.load(low))) for total, low in zip(totals, lows, strict=True)]


def _dot_of(tokens: int) -> Any:
    """A function of numba: two rows of blocks times `tokens` consecutive vectors, the products of the first row first.

    A product has the same bits for any number of vectors. `code` is the ggml type of the blocks, a constant.
    """

    def dot(
        _context: Any, code: Any, row: Any, row_stride: Any, x: Any, columns: Any
    ) -> tuple[Any, Callable[..., ir.Value]]:
        format_ = BLOCKS[code.literal_value]

        def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
            return context.make_tuple(builder, signature.return_type, _dot_blocks(builder, format_, tokens, args))

        return types.UniTuple(types.float32, 2 * tokens)(code, *[types.int64] * 4), generate

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
def _round_part(
    _context: Any, x: Any, out: Any, scale: Any, total: Any, rest: Any
) -> tuple[Any, Callable[..., ir.Value]]:
    """Round 32 numbers to multiples of a scale, the largest to 32767 times it.

    Write the 16-bit integers, the scale, their sum times the scale, and the rounding error of each number. A part
    without a number above 1e-30 counts as 0. If a number is not finite, the scale and the sum are not.
    """

    def generate(context: Any, b: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
        x, out, scale_at, total_at, rest = args
        reader = BlockReader(b, x)
        vectors = [reader.read(32 * k, VECTOR) for k in range(4)]
        highest, not_finite = floats(0), floats(0)
        for vector in vectors:
            highest = call_llvm(b, "maxnum", highest, call_llvm(b, "fabs", vector))
            not_finite = call_llvm(b, "fma", vector, floats(0), not_finite)
        greatest = reduced(b, highest, lambda b, x, y: b.select(b.fcmp_ordered(">", x, y), x, y))
        scale = b.fadd(b.fmul(greatest, F32(1 / 32767)), _sum(b, not_finite))
        inverse = b.select(b.fcmp_ordered(">", greatest, F32(1e-30)), b.fdiv(F32(32767), greatest), F32(0))
        scales, inverses = reader.splat(scale), reader.splat(inverse)
        sums = None
        for k, vector in enumerate(vectors):
            nearest = call_llvm(b, "nearbyint", b.fmul(vector, inverses))
            whole = b.fptosi(nearest, INTEGERS)
            sums = whole if sums is None else b.add(sums, whole)
            _store(b, b.add(out, _I64(16 * k)), b.trunc(whole, ir.VectorType(_I16, WIDTH)))
            _store(b, b.add(rest, _I64(32 * k)), call_llvm(b, "fma", b.fneg(nearest), scales, vector))
        summed = reduced(b, sums, lambda b, x, y: b.add(x, y))
        _store(b, scale_at, scale)
        _store(b, total_at, b.fmul(b.sitofp(summed, F32), scale))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate


@cache
def room(tokens: int, columns: int, rounds: int) -> int:
    """The 16-bit integers that `rounded` writes."""
    return rounds * tokens * (columns + columns // 8) + 2 * columns


@inner
def rounded(x, linears, out):
    """Round vectors x [n, columns] to 16 bits, as `project_any` takes them.

    Args:
        linears: as `project_any` takes them, with the rounds that each needs. The second round rounds the errors of the
            first.
        out: the address of int16 [rounds n, columns + columns / 8]: the integers, then a float32 scale for each 32 of
            them, then their sum times the scale, float32. The errors of a vector follow.
    """
    n, columns, rounds = x.shape[0], x.shape[1], 0
    for linear in linears:
        rounds = max(rounds, linear[7])
    row = 2 * columns + columns // 4
    rest = out + rounds * n * row
    for t in range(n):
        source = np.int64(x[t].ctypes.data)
        for k in range(rounds):
            target = out + (k * n + t) * row
            scales, sums = target + 2 * columns, target + 2 * columns + columns // 8
            for part in range(columns // PART):
                place = source + 128 * part
                _round_part(place, target + 64 * part, scales + 4 * part, sums + 4 * part, rest + 128 * part)
            source = rest


def _product(code):
    """The source of a kernel that multiplies the rows [start, stop) of a matrix of one format."""
    if code in NUMBERS:
        kind = NUMBERS[code]

        def numbers(linear, x, vectors, tokens, start, stop, out, out_columns, offset):
            table = carray(pointer(np.int64, linear), 5)
            target = carray(pointer(np.float32, out), (tokens, out_columns))
            project_rows(kind, table, x, tokens, start, stop, target, offset)

        return numbers

    def blocks(linear, x, vectors, tokens, start, stop, out, out_columns, offset):
        table = carray(pointer(np.int64, linear), 8)
        data, bias, columns, row_bytes, rounds = table[0], table[2], table[4], table[5], table[7]
        target = carray(pointer(np.float32, out), (tokens, out_columns))
        size = 2 * columns + columns // 4
        for r in range(start, stop, 2):
            row, second = data + r * row_bytes, min(r + 1, stop - 1)
            stride = (second - r) * row_bytes
            fetch(np.uint8, row, _AHEAD, 2 * row_bytes)
            shift, second_shift = (get(bias, r), get(bias, second)) if bias else (np.float32(0), np.float32(0))
            t, column, second_column = 0, offset + r, offset + second
            while rounds == 1 and t + 4 <= tokens:
                products = dot_4(code, row, stride, vectors + t * size, columns)
                for k in range(4):
                    target[t + k, column] = products[k] + shift
                    target[t + k, second_column] = products[4 + k] + second_shift
                t += 4
            while t < tokens:
                a, b = dot(code, row, stride, vectors + t * size, columns)
                for k in range(1, rounds):
                    rest = dot(code, row, stride, vectors + (k * tokens + t) * size, columns)
                    a, b = a + rest[0], b + rest[1]
                target[t, column], target[t, second_column] = a + shift, b + second_shift
                t += 1

    return blocks


def _unpacker(code, kind):
    """The source of a kernel that unpacks the rows [start, stop) of a matrix of one format to one kind of numbers."""

    def rows(data, row_bytes, columns, start, stop, out):
        for r in range(start, stop):
            _unpack_row(code, kind, data + r * row_bytes, columns, out + size_of(kind) * r * columns)

    return rows


def product(code: int) -> int:
    """The address of the kernel that multiplies by weights of a ggml type. It is compiled for the first matrix."""
    return int(compiled(_product, code).address)


def unpack(code: int, kind: type, data: int, rows: int, row_bytes: int, columns: int, out: int, threads: int) -> None:
    """Write the weights of blocks of a ggml type at address `data` to address `out`, [rows, columns].

    Args:
        kind: of the numbers written: np.float32, or np.uint16 for bfloat16, rounded to nearest, ties to even.
    """
    of = np.array([compiled(_unpacker, code, kind).address, data, rows, row_bytes, columns, out], np.int64)
    _ARGUMENTS.run(_unpack_share, threads, of=of)


_ARGUMENTS = Arguments(of=int64[::1])
_arrays_at = _ARGUMENTS.arrays_at


def _unpack_share(thread, threads, address):
    """The rows of one thread."""
    of = _arrays_at(address).of
    kernel, data, rows, row_bytes, columns, out = of[0], of[1], of[2], of[3], of[4], of[5]
    start, stop = rows_of(thread, threads, rows)
    call(kernel, (data, row_bytes, columns, start, stop, out))


@inner
def project_any(linear, x, vectors, tokens, start, stop, out, offset):
    """`project_rows` for weights of any kind or format.

    Args:
        linear: int64 [8]: as in `project_rows`, then the bytes of a row, the `product` of the format, and the `rounds`
            of `vectors`.
        vectors: the address of what `rounded` wrote.
    """
    target = out.ctypes.data, out.shape[1], offset
    call(linear[6], (linear.ctypes.data, x, vectors, tokens, start, stop, *target))
