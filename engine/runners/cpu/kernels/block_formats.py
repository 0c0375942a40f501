"""How the blocks of GGUF files are read: as LLVM code that turns their bytes into numbers.

A block is a few parts of 32 weights, and a weight is scale * (quant - offset) + low. A part is read as eight lanes of
four bytes, one quant a byte. Bytes are not shifted to the bottom of their lanes: byte k, converted where it is, gives
2^(8 k) times its quant. The vectors are divided by this factor instead, once for all rows (`arrange` in blocks.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import llvmlite.ir as ir
import numpy as np

from .simd import I32, INTEGERS, VECTOR, WIDTH

PART = 32  # weights of a part

_I8, _I16, _I64 = ir.IntType(8), ir.IntType(16), ir.IntType(64)
_BYTES = ir.VectorType(_I8, PART)


@dataclass(frozen=True)
class BlockPart:
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
        return b.sitofp(b.and_(self.quants, _integers(self.mask << 8 * k)), VECTOR)

    def in_order(self, b: ir.IRBuilder, k: int) -> ir.Value:
        """The quants 8 k to 8 k + 7."""
        masked = b.and_(self.quants, _integers(self.mask * 0x01010101)) if self.mask else self.quants
        eight = shuffle(b, b.bitcast(masked, _BYTES), range(8 * k, 8 * k + 8))
        return b.sitofp((b.zext if self.mask else b.sext)(eight, INTEGERS), VECTOR)

    def weights(self, b: ir.IRBuilder, k: int) -> ir.Value:
        """The weights 8 k to 8 k + 7, rounded after each operation."""
        lanes = [2 * k] * 4 + [2 * k + 1] * 4
        weights = b.fmul(b.fsub(self.in_order(b, k), floats(self.offset)), shuffle(b, self.scale, lanes))
        return weights if self.low is None else b.fadd(weights, shuffle(b, self.low, lanes))


def _integers(value: int | list[int]) -> ir.Constant:
    return ir.Constant(INTEGERS, value if isinstance(value, list) else [value] * WIDTH)


def floats(value: float) -> ir.Constant:
    return ir.Constant(VECTOR, [value] * WIDTH)


def shuffle(b: ir.IRBuilder, x: ir.Value, places: Any) -> ir.Value:
    places = list(places)
    return b.shuffle_vector(x, x, ir.Constant(ir.VectorType(I32, len(places)), places))


def load_from(b: ir.IRBuilder, address: ir.Value, kind: ir.Type) -> ir.Value:
    """What is at an address, which need not be aligned."""
    return b.load(b.inttoptr(address, kind.as_pointer()), align=1)


class BlockReader:
    """Reads the fields of a block at an address."""

    def __init__(self, b: ir.IRBuilder, address: ir.Value) -> None:
        self.b, self._address = b, address

    def read(self, offset: int, kind: ir.Type) -> ir.Value:
        return load_from(self.b, self.b.add(self._address, _I64(offset)), kind)

    def splat(self, x: ir.Value) -> ir.Value:
        kind = ir.VectorType(x.type, WIDTH)
        return shuffle(self.b, self.b.insert_element(ir.Constant(kind, ir.Undefined), x, I32(0)), [0] * WIDTH)

    def half(self, offset: int) -> ir.Value:
        """A float16 number for all lanes. It is converted there: a scalar would be inserted into a register in use."""
        b = self.b
        halves = b.bitcast(self.splat(self.read(offset, _I16)), ir.VectorType(ir.HalfType(), WIDTH))
        return b.fpext(halves, VECTOR)

    def shifted(self, x: ir.Value, left: int) -> ir.Value:
        """x shifted to the left, or to the right if `left` is negative."""
        return self.b.shl(x, _integers(left)) if left >= 0 else self.b.lshr(x, _integers(-left))

    def nibbles(self, offset: int) -> ir.Value:
        """The low halves of 16 bytes, then the high halves."""
        four = self.read(offset, ir.VectorType(I32, 4))
        return self.b.lshr(shuffle(self.b, four, [0, 1, 2, 3] * 2), _integers([0] * 4 + [4] * 4))

    def joined(self, low: ir.Value, high: ir.Value, high_mask: int) -> ir.Value:
        """In each byte, four bits of `low` and the masked bits of `high`."""
        b = self.b
        return b.or_(b.and_(low, _integers(0x0F0F0F0F)), b.and_(high, _integers(high_mask * 0x01010101)))

    def fives(self, nibbles: int, bits: int) -> ir.Value:
        """The nibbles at an offset with a fifth bit from 32 bits at another."""
        b = self.b
        spread = shuffle(b, b.bitcast(self.splat(self.read(bits, I32)), _BYTES), [n // 8 for n in range(PART)])
        places = ir.Constant(_BYTES, [1 << n % 8 for n in range(PART)])
        is_set = b.icmp_unsigned("==", b.and_(spread, places), places)
        fifth = b.select(is_set, ir.Constant(_BYTES, [16] * PART), ir.Constant(_BYTES, [0] * PART))
        return self.joined(self.nibbles(nibbles), b.bitcast(fifth, INTEGERS), 0x10)

    def scales_and_lows(self) -> tuple[list[ir.Value], ir.Value]:
        """Of a K block, by part: 6-bit numbers in 12 bytes, times float16 numbers. Four scales, twice, are a vector."""
        b = self.b
        first, second, third = (self.read(offset, I32) for offset in (4, 8, 12))

        def fours(low: ir.Value, high: ir.Value) -> tuple[ir.Value, ir.Value]:
            upper = b.and_(b.lshr(low, I32(2)), I32(0x30303030))
            return b.and_(low, I32(0x3F3F3F3F)), b.or_(b.and_(high, I32(0x0F0F0F0F)), upper)

        def numbers(factor: ir.Value, four: ir.Value, other: ir.Value) -> ir.Value:
            both = b.insert_element(ir.Constant(ir.VectorType(I32, 2), ir.Undefined), four, I32(0))
            both = b.bitcast(b.insert_element(both, other, I32(1)), ir.VectorType(_I8, WIDTH))
            return b.fmul(factor, b.sitofp(b.zext(both, INTEGERS), VECTOR))

        d, lowest = self.half(0), b.fneg(self.half(2))
        scales = [numbers(d, four, four) for four in fours(first, third)]
        return scales, numbers(lowest, *fours(second, b.lshr(third, I32(4))))

    def lanes(self, x: ir.Value, first: int, second: int) -> ir.Value:
        """Number `first` of x for four lanes and number `second` for the others."""
        return shuffle(self.b, x, [first] * 4 + [second] * 4)


def _q8_0(block: BlockReader) -> Iterator[BlockPart]:
    yield BlockPart(block.read(2, INTEGERS), 0, block.half(0))


def _q4_0(block: BlockReader) -> Iterator[BlockPart]:
    yield BlockPart(block.nibbles(2), 15, block.half(0), offset=8)


def _q4_1(block: BlockReader) -> Iterator[BlockPart]:
    yield BlockPart(block.nibbles(4), 15, block.half(0), low=block.half(2))


def _q5_0(block: BlockReader) -> Iterator[BlockPart]:
    yield BlockPart(block.fives(6, 2), 31, block.half(0), offset=16)


def _q5_1(block: BlockReader) -> Iterator[BlockPart]:
    yield BlockPart(block.fives(8, 4), 31, block.half(0), low=block.half(2))


def _q4_k(block: BlockReader) -> Iterator[BlockPart]:
    yield from _k_parts(block, 16, 15, lambda nibbles, _: nibbles)


def _q5_k(block: BlockReader) -> Iterator[BlockPart]:
    bits = block.read(16, INTEGERS)
    yield from _k_parts(block, 48, 31, lambda nibbles, part: block.joined(nibbles, block.shifted(bits, 4 - part), 0x10))


def _k_parts(
    block: BlockReader, start: int, mask: int, quants: Callable[[ir.Value, int], ir.Value]
) -> Iterator[BlockPart]:
    """The parts of a K block whose nibbles begin at `start`; `quants` makes quants of the nibbles of a part."""
    scales, lows = block.scales_and_lows()
    for part in range(8):
        nibbles = block.shifted(block.read(start + part // 2 * 32, INTEGERS), -4 if part % 2 else 0)
        yield BlockPart(
            quants(nibbles, part),
            mask,
            block.lanes(scales[part // 4], part % 4, 4 + part % 4),
            low=block.lanes(lows, part, part),
            lows=lows,
        )


def _q6_k(block: BlockReader) -> Iterator[BlockPart]:
    b, d = block.b, block.half(208)
    for half in range(2):
        whole = b.sext(block.read(192 + 8 * half, ir.VectorType(_I8, WIDTH)), INTEGERS)
        scales, bits = b.fmul(d, b.sitofp(whole, VECTOR)), block.read(128 + 32 * half, INTEGERS)
        for part in range(4):
            nibbles = block.read(64 * half + part % 2 * 32, INTEGERS)
            quants = block.joined(
                block.shifted(nibbles, -4 if part > 1 else 0), block.shifted(bits, 4 - 2 * part), 0x30
            )
            yield BlockPart(quants, 63, block.lanes(scales, 2 * part, 2 * part + 1), offset=32)


@dataclass(frozen=True)
class BlockFormat:
    """How the blocks of a ggml type are read."""

    weights: int  # of a block
    size: int  # of a block in bytes
    parts: Callable[[BlockReader], Iterator[BlockPart]]

    @property
    def in_order(self) -> bool:
        """Signed bytes are not read in place; their vectors are not arranged."""
        return self.parts is _q8_0


BLOCKS = {
    2: BlockFormat(32, 18, _q4_0),
    3: BlockFormat(32, 20, _q4_1),
    6: BlockFormat(32, 22, _q5_0),
    7: BlockFormat(32, 24, _q5_1),
    8: BlockFormat(32, 34, _q8_0),
    12: BlockFormat(256, 144, _q4_k),
    13: BlockFormat(256, 176, _q5_k),
    14: BlockFormat(256, 210, _q6_k),
}
NUMBERS = {0: np.float32, 1: np.float16, 30: np.uint16}
BLOCK_FORMATS = frozenset(BLOCKS)
FORMATS = BLOCK_FORMATS | NUMBERS.keys()
