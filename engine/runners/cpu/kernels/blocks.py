"""Products with weights in the blocks of a GGUF file, and the weights themselves as float32.

A block is a few parts of 32 weights, and a weight is scale * (quant - offset) + low. A part is read as eight lanes of
four bytes, one quant a byte. Bytes are not shifted to the bottom of their lanes: byte k, converted where it is, gives
2^(8 k) times its quant. The vectors are divided by this factor instead, once for all rows (`arrange`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import llvmlite.ir as ir
import numpy as np
from numba import carray, cfunc, njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from .folder import cached_in_folder
from .linear import AHEAD, project_rows, rows_of
from .simd import fetch, get

WIDTH, PART = 8, 32  # lanes; weights of a part

_F32, _I8, _I16, _I32, _I64 = ir.FloatType(), ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_VECTOR, _INTEGERS, _BYTES = ir.VectorType(_F32, WIDTH), ir.VectorType(_I32, WIDTH), ir.VectorType(_I8, PART)


@dataclass(frozen=True)
class _Part:
    """32 weights of a block.

    Args:
        quants: <8 x i32>, a quant in some bits of each byte, in the order of the weights.
        mask: these bits; 0 for signed bytes.
        scale, low: a number for each lane; `low` may be None.
        offset: subtracted from each quant.
        lows: in a block of eight parts, the `low` of each.
    """

    quants: ir.Value
    mask: int
    scale: ir.Value
    offset: int = 0
    low: ir.Value | None = None
    lows: ir.Value | None = None

    def in_place(self, b: ir.IRBuilder, k: int) -> ir.Value:
        """Byte k of every lane, times 2^(8 k)."""
        return b.sitofp(b.and_(self.quants, _integers(self.mask << 8 * k)), _VECTOR)

    def in_order(self, b: ir.IRBuilder, k: int) -> ir.Value:
        """The quants 8 k to 8 k + 7."""
        masked = b.and_(self.quants, _integers(self.mask * 0x01010101)) if self.mask else self.quants
        eight = _shuffle(b, b.bitcast(masked, _BYTES), range(8 * k, 8 * k + 8))
        return b.sitofp((b.zext if self.mask else b.sext)(eight, _INTEGERS), _VECTOR)

    def weights(self, b: ir.IRBuilder, k: int) -> ir.Value:
        """The weights 8 k to 8 k + 7, rounded after each operation."""
        lanes = [2 * k] * 4 + [2 * k + 1] * 4
        weights = b.fmul(b.fsub(self.in_order(b, k), _floats(self.offset)), _shuffle(b, self.scale, lanes))
        return weights if self.low is None else b.fadd(weights, _shuffle(b, self.low, lanes))


def _integers(value: int | list[int]) -> ir.Constant:
    return ir.Constant(_INTEGERS, value if isinstance(value, list) else [value] * WIDTH)


def _floats(value: float) -> ir.Constant:
    return ir.Constant(_VECTOR, [value] * WIDTH)


def _shuffle(b: ir.IRBuilder, x: ir.Value, places: Any) -> ir.Value:
    places = list(places)
    return b.shuffle_vector(x, x, ir.Constant(ir.VectorType(_I32, len(places)), places))


def _load(b: ir.IRBuilder, address: ir.Value, kind: ir.Type) -> ir.Value:
    return b.load(b.inttoptr(address, kind.as_pointer()), align=1)


def _store(b: ir.IRBuilder, address: ir.Value, x: ir.Value) -> None:
    b.store(x, b.inttoptr(address, x.type.as_pointer()), align=4)


def _fma(b: ir.IRBuilder, *args: ir.Value) -> ir.Value:
    kind = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
    return b.call(cgutils.get_or_insert_function(b.module, kind, "llvm.fma.v8f32"), args)


def _sum(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    for half in (4, 2, 1):
        x = b.fadd(_shuffle(b, x, range(half)), _shuffle(b, x, range(half, 2 * half)))
    return b.extract_element(x, ir.Constant(_I32, 0))


class _Block:
    """Reads the fields of a block at an address."""

    def __init__(self, b: ir.IRBuilder, address: ir.Value) -> None:
        self.b, self._address = b, address

    def read(self, offset: int, kind: ir.Type) -> ir.Value:
        return _load(self.b, self.b.add(self._address, _I64(offset)), kind)

    def splat(self, x: ir.Value) -> ir.Value:
        kind = ir.VectorType(x.type, WIDTH)
        return _shuffle(self.b, self.b.insert_element(ir.Constant(kind, ir.Undefined), x, _I32(0)), [0] * WIDTH)

    def half(self, offset: int) -> ir.Value:
        """A float16 number for all lanes. It is converted there: a scalar would be inserted into a register in use."""
        b = self.b
        halves = b.bitcast(self.splat(self.read(offset, _I16)), ir.VectorType(ir.HalfType(), WIDTH))
        return b.fpext(halves, _VECTOR)

    def shifted(self, x: ir.Value, left: int) -> ir.Value:
        """x shifted to the left, or to the right if `left` is negative."""
        return self.b.shl(x, _integers(left)) if left >= 0 else self.b.lshr(x, _integers(-left))

    def nibbles(self, offset: int) -> ir.Value:
        """The low halves of 16 bytes, then the high halves."""
        four = self.read(offset, ir.VectorType(_I32, 4))
        return self.b.lshr(_shuffle(self.b, four, [0, 1, 2, 3] * 2), _integers([0] * 4 + [4] * 4))

    def joined(self, low: ir.Value, high: ir.Value, high_mask: int) -> ir.Value:
        """In each byte, four bits of `low` and the masked bits of `high`."""
        b = self.b
        return b.or_(b.and_(low, _integers(0x0F0F0F0F)), b.and_(high, _integers(high_mask * 0x01010101)))

    def fives(self, nibbles: int, bits: int) -> ir.Value:
        """The nibbles at an offset with a fifth bit from 32 bits at another."""
        b = self.b
        spread = _shuffle(b, b.bitcast(self.splat(self.read(bits, _I32)), _BYTES), [n // 8 for n in range(PART)])
        places = ir.Constant(_BYTES, [1 << n % 8 for n in range(PART)])
        is_set = b.icmp_unsigned("==", b.and_(spread, places), places)
        fifth = b.select(is_set, ir.Constant(_BYTES, [16] * PART), ir.Constant(_BYTES, [0] * PART))
        return self.joined(self.nibbles(nibbles), b.bitcast(fifth, _INTEGERS), 0x10)

    def scales_and_lows(self) -> tuple[list[ir.Value], ir.Value]:
        """Of a K block, by part: 6-bit numbers in 12 bytes, times float16 numbers. Four scales, twice, are a vector."""
        b = self.b
        first, second, third = (self.read(offset, _I32) for offset in (4, 8, 12))

        def fours(low: ir.Value, high: ir.Value) -> tuple[ir.Value, ir.Value]:
            upper = b.and_(b.lshr(low, _I32(2)), _I32(0x30303030))
            return b.and_(low, _I32(0x3F3F3F3F)), b.or_(b.and_(high, _I32(0x0F0F0F0F)), upper)

        def numbers(factor: ir.Value, four: ir.Value, other: ir.Value) -> ir.Value:
            both = b.insert_element(ir.Constant(ir.VectorType(_I32, 2), ir.Undefined), four, _I32(0))
            both = b.bitcast(b.insert_element(both, other, _I32(1)), ir.VectorType(_I8, WIDTH))
            return b.fmul(factor, b.sitofp(b.zext(both, _INTEGERS), _VECTOR))

        d, lowest = self.half(0), b.fneg(self.half(2))
        scales = [numbers(d, four, four) for four in fours(first, third)]
        return scales, numbers(lowest, *fours(second, b.lshr(third, _I32(4))))

    def lanes(self, x: ir.Value, first: int, second: int) -> ir.Value:
        """Number `first` of x for four lanes and number `second` for the others."""
        return _shuffle(self.b, x, [first] * 4 + [second] * 4)


def _q8_0(block: _Block) -> Iterator[_Part]:
    yield _Part(block.read(2, _INTEGERS), 0, block.half(0))


def _q4_0(block: _Block) -> Iterator[_Part]:
    yield _Part(block.nibbles(2), 15, block.half(0), offset=8)


def _q4_1(block: _Block) -> Iterator[_Part]:
    yield _Part(block.nibbles(4), 15, block.half(0), low=block.half(2))


def _q5_0(block: _Block) -> Iterator[_Part]:
    yield _Part(block.fives(6, 2), 31, block.half(0), offset=16)


def _q5_1(block: _Block) -> Iterator[_Part]:
    yield _Part(block.fives(8, 4), 31, block.half(0), low=block.half(2))


def _q4_k(block: _Block) -> Iterator[_Part]:
    scales, lows = block.scales_and_lows()
    for part in range(8):
        nibbles = block.shifted(block.read(16 + part // 2 * 32, _INTEGERS), -4 if part % 2 else 0)
        yield _Part(
            nibbles,
            15,
            block.lanes(scales[part // 4], part % 4, 4 + part % 4),
            low=block.lanes(lows, part, part),
            lows=lows,
        )


def _q5_k(block: _Block) -> Iterator[_Part]:
    scales, lows = block.scales_and_lows()
    bits = block.read(16, _INTEGERS)
    for part in range(8):
        nibbles = block.shifted(block.read(48 + part // 2 * 32, _INTEGERS), -4 if part % 2 else 0)
        quants = block.joined(nibbles, block.shifted(bits, 4 - part), 0x10)
        yield _Part(
            quants,
            31,
            block.lanes(scales[part // 4], part % 4, 4 + part % 4),
            low=block.lanes(lows, part, part),
            lows=lows,
        )


def _q6_k(block: _Block) -> Iterator[_Part]:
    b, d = block.b, block.half(208)
    for half in range(2):
        whole = b.sext(block.read(192 + 8 * half, ir.VectorType(_I8, WIDTH)), _INTEGERS)
        scales, bits = b.fmul(d, b.sitofp(whole, _VECTOR)), block.read(128 + 32 * half, _INTEGERS)
        for part in range(4):
            nibbles = block.read(64 * half + part % 2 * 32, _INTEGERS)
            quants = block.joined(
                block.shifted(nibbles, -4 if part > 1 else 0), block.shifted(bits, 4 - 2 * part), 0x30
            )
            yield _Part(quants, 63, block.lanes(scales, 2 * part, 2 * part + 1), offset=32)


@dataclass(frozen=True)
class _Format:
    weights: int  # of a block
    size: int  # of a block in bytes
    parts: Callable[[_Block], Iterator[_Part]]

    @property
    def in_order(self) -> bool:
        """Signed bytes are not read in place; their vectors are not arranged."""
        return self.parts is _q8_0


_BLOCKS = {
    2: _Format(32, 18, _q4_0),
    3: _Format(32, 20, _q4_1),
    6: _Format(32, 22, _q5_0),
    7: _Format(32, 24, _q5_1),
    8: _Format(32, 34, _q8_0),
    12: _Format(256, 144, _q4_k),
    13: _Format(256, 176, _q5_k),
    14: _Format(256, 210, _q6_k),
}
_NUMBERS = {0: np.float32, 1: np.float16, 30: np.uint16}
BLOCK_FORMATS = frozenset(_BLOCKS)
FORMATS = BLOCK_FORMATS | _NUMBERS.keys()


def _dot_blocks(b: ir.IRBuilder, format_: _Format, tokens: int, args: Any) -> list[ir.Value]:
    """The products of two rows and `tokens` consecutive vectors, in the same order of sums for any number of tokens."""
    _, row, row_stride, x, arranged, columns = args
    totals = [cgutils.alloca_once(b, _VECTOR) for _ in range(2 * tokens)]
    lows = [cgutils.alloca_once(b, _VECTOR) for _ in range(2 * tokens)]
    for place in (*totals, *lows):
        b.store(_floats(0), place)

    bytes_of_x = b.mul(columns, _I64(4))
    start, stride = x, bytes_of_x
    if not format_.in_order:
        start, stride = arranged, b.add(b.add(bytes_of_x, columns), b.udiv(columns, _I64(8)))
    with cgutils.for_range(b, b.udiv(columns, _I64(format_.weights))) as loop:
        block = b.add(row, b.mul(loop.index, _I64(format_.size)))
        first = b.add(start, b.mul(loop.index, _I64(4 * format_.weights)))
        first_sum = b.add(b.add(start, bytes_of_x), b.mul(loop.index, _I64(format_.weights)))
        first_part_sum = b.add(b.add(start, b.add(bytes_of_x, columns)), b.mul(loop.index, _I64(format_.weights // 8)))
        two = (format_.parts(_Block(b, address)) for address in (block, b.add(block, row_stride)))
        for n, parts in enumerate(zip(*two, strict=True)):
            for r, part in enumerate(parts):
                quants = [part.in_order(b, k) if format_.in_order else part.in_place(b, k) for k in range(4)]
                for t in range(tokens):
                    offset = b.mul(stride, _I64(t))
                    sums = b.add(b.add(first_sum, offset), _I64(PART * n))
                    total = None
                    if part.offset:
                        total = b.fmul(_load(b, sums, _VECTOR), _floats(-part.offset))
                    for k, quant in enumerate(quants):
                        vector = _load(b, b.add(b.add(first, offset), _I64(4 * (PART * n + 8 * k))), _VECTOR)
                        total = b.fmul(quant, vector) if total is None else _fma(b, quant, vector, total)
                    place = r * tokens + t
                    b.store(_fma(b, part.scale, total, b.load(totals[place])), totals[place])
                    if part.lows is not None and n == 0:
                        sums = b.add(first_part_sum, offset)
                        b.store(_fma(b, part.lows, _load(b, sums, _VECTOR), b.load(lows[place])), lows[place])
                    elif part.lows is None and part.low is not None:
                        b.store(_fma(b, part.low, _load(b, sums, _VECTOR), b.load(lows[place])), lows[place])

    return [_sum(b, b.fadd(b.load(total), b.load(low))) for total, low in zip(totals, lows, strict=True)]


@intrinsic(prefer_literal=True)
def dot(
    _context: Any, code: Any, row: Any, row_stride: Any, x: Any, arranged: Any, columns: Any
) -> tuple[Any, Callable[..., ir.Value]]:
    """Two rows of blocks times a vector. `code` is the ggml type of the blocks, a constant."""
    format_ = _BLOCKS[code.literal_value]

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return context.make_tuple(builder, signature.return_type, _dot_blocks(builder, format_, 1, args))

    return types.UniTuple(types.float32, 2)(code, *[types.int64] * 5), generate


@intrinsic(prefer_literal=True)
def dot_4(
    _context: Any, code: Any, row: Any, row_stride: Any, x: Any, arranged: Any, columns: Any
) -> tuple[Any, Callable[..., ir.Value]]:
    """`dot` with four consecutive vectors: four products of each row, with the same bits as those of `dot`."""
    format_ = _BLOCKS[code.literal_value]

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return context.make_tuple(builder, signature.return_type, _dot_blocks(builder, format_, 4, args))

    return types.UniTuple(types.float32, 8)(code, *[types.int64] * 5), generate


@intrinsic(prefer_literal=True)
def _unpack_row(_context: Any, code: Any, row: Any, columns: Any, out: Any) -> tuple[Any, Callable[..., ir.Value]]:
    """Write the weights of a row of blocks to an address."""
    format_ = _BLOCKS[code.literal_value]

    def generate(context: Any, b: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
        _, row, columns, out = args
        with cgutils.for_range(b, b.udiv(columns, _I64(format_.weights))) as loop:
            block = _Block(b, b.add(row, b.mul(loop.index, _I64(format_.size))))
            first = b.add(out, b.mul(loop.index, _I64(4 * format_.weights)))
            for n, part in enumerate(format_.parts(block)):
                for k in range(4):
                    _store(b, b.add(first, _I64(4 * (PART * n + 8 * k))), part.weights(b, k))
        return context.get_dummy_value()

    return types.void(code, *[types.int64] * 3), generate


@intrinsic
def _arrange_part(_context: Any, x: Any, out: Any, sums: Any, part_sum: Any) -> tuple[Any, Callable[..., ir.Value]]:
    """Write 32 numbers in the order in which a part is read, the sums of each lane, and their sum."""

    def generate(context: Any, b: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
        x, out, sums, part_sum = args
        numbers, total = _load(b, x, ir.VectorType(_F32, PART)), None
        for k in range(4):
            lane = _shuffle(b, numbers, range(k, PART, 4))
            total = lane if total is None else b.fadd(total, lane)
            _store(b, b.add(out, _I64(32 * k)), b.fmul(lane, _floats(2.0 ** (-8 * k))))
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
    if code in _NUMBERS:
        kind = _NUMBERS[code]

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
            fetch(np.uint8, row, AHEAD, 2 * row_bytes)
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


def _unpacker(code):
    """The source of a kernel that unpacks the rows [start, stop) of a matrix of one format."""

    def rows(data, row_bytes, columns, start, stop, out):
        for r in range(start, stop):
            _unpack_row(code, data + r * row_bytes, columns, out + 4 * r * columns)

    return rows


_PRODUCT = types.void(
    types.CPointer(types.int64), *[types.int64] * 5, types.CPointer(types.float32), types.int64, types.int64
)
_UNPACKER = types.void(*[types.int64] * 6)


@cache
def _compiled(source, signature, code):
    with cached_in_folder():
        return cfunc(signature, cache=True)(source(code))


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


def unpack(code: int, data: int, rows: int, row_bytes: int, columns: int, out: int, threads: int) -> None:
    """Write the weights of blocks of a ggml type at address `data` to address `out`, float32 [rows, columns]."""
    _unpack(_compiled(_unpacker, _UNPACKER, code).address, data, rows, row_bytes, columns, out, threads)


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
