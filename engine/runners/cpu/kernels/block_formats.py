"""How the blocks of GGUF files are read: as LLVM code that turns their bytes into 16-bit integers.

A block is a few parts of 32 weights, and a weight is scale * quant + low. The quants are signed: what a format
subtracts from its bits is subtracted here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import llvmlite.ir as ir
import numpy as np

from .simd import I32, INTEGERS, VECTOR, WIDTH

PART = 32  # weights of a part
LANES = PART // 2  # 16-bit integers of a register of 256 bits

_I1, _I8, _I16, _I64 = (ir.IntType(bits) for bits in (1, 8, 16, 64))
SHORTS = ir.VectorType(_I16, LANES)


@dataclass(frozen=True)
class BlockPart:
    """32 weights of a block.

    Args:
        quants: two vectors <16 x i16>, in the order of the weights.
        scale: a number, eight times.
        factors: for each vector of quants, an integer by which they are multiplied, <16 x i16>; None for 1.
        low: a number, eight times; None for 0.
        lows: in a block of eight parts, the `low` of each.
    """

    quants: tuple[ir.Value, ir.Value]
    scale: ir.Value
    factors: tuple[ir.Value, ir.Value] | None = None
    low: ir.Value | None = None
    lows: ir.Value | None = None

    def integers(self, b: ir.IRBuilder) -> list[ir.Value]:
        """The quants times their factors."""
        if self.factors is None:
            return list(self.quants)
        return [b.mul(quants, factor) for quants, factor in zip(self.quants, self.factors, strict=True)]

    def weights(self, b: ir.IRBuilder, k: int) -> ir.Value:
        """The weights 8 k to 8 k + 7, rounded after each operation."""
        scale = self.scale
        if self.factors is not None:
            scale = b.fmul(scale, _as_floats(b, self.factors[k // 2], range(8)))
        first = k % 2 * 8
        weights = b.fmul(_as_floats(b, self.quants[k // 2], range(first, first + 8)), scale)
        return weights if self.low is None else b.fadd(weights, self.low)


def _as_floats(b: ir.IRBuilder, integers: ir.Value, places: range) -> ir.Value:
    return b.sitofp(b.sext(shuffle(b, integers, places), INTEGERS), VECTOR)


def floats(value: float) -> ir.Constant:
    return ir.Constant(VECTOR, [value] * WIDTH)


def _shorts(value: int) -> ir.Constant:
    return ir.Constant(SHORTS, [value] * LANES)


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

    def splat(self, x: ir.Value, count: int = WIDTH) -> ir.Value:
        kind = ir.VectorType(x.type, count)
        return shuffle(self.b, self.b.insert_element(ir.Constant(kind, ir.Undefined), x, I32(0)), [0] * count)

    def half(self, offset: int) -> ir.Value:
        """A float16 number for all lanes. It is converted there: a scalar would be inserted into a register in use."""
        b = self.b
        halves = b.bitcast(self.splat(self.read(offset, _I16)), ir.VectorType(ir.HalfType(), WIDTH))
        return b.fpext(halves, VECTOR)

    def bytes(self, offset: int, signed: bool = False) -> ir.Value:
        """16 bytes, as 16-bit integers."""
        found = self.read(offset, ir.VectorType(_I8, LANES))
        return (self.b.sext if signed else self.b.zext)(found, SHORTS)

    def shifted(self, x: ir.Value, left: int) -> ir.Value:
        """x shifted to the left, or to the right if `left` is negative."""
        return self.b.shl(x, _shorts(left)) if left >= 0 else self.b.lshr(x, _shorts(-left))

    def masked(self, x: ir.Value, mask: int) -> ir.Value:
        return self.b.and_(x, _shorts(mask))

    def minus(self, x: ir.Value, offset: int) -> ir.Value:
        return self.b.sub(x, _shorts(offset))

    def nibble(self, x: ir.Value, high: bool) -> ir.Value:
        """The low or the high half of each byte."""
        return self.shifted(x, -4) if high else self.masked(x, 15)

    def nibbles(self, offset: int) -> list[ir.Value]:
        """The low halves of 16 bytes, and the high halves."""
        found = self.bytes(offset)
        return [self.nibble(found, high) for high in (False, True)]

    def fives(self, nibbles: int, bits: int, offset: int = 0) -> tuple[ir.Value, ir.Value]:
        """The nibbles at an offset with a fifth bit from 16 and 16 bits at another, less `offset`."""
        b = self.b
        found = []
        for n, nibble in enumerate(self.nibbles(nibbles)):
            is_set = b.bitcast(self.read(bits + 2 * n, _I16), ir.VectorType(_I1, LANES))
            found.append(b.add(nibble, b.select(is_set, _shorts(16 - offset), _shorts(-offset))))
        return found[0], found[1]

    def scales_and_lows(self) -> tuple[ir.Value, ir.Value]:
        """Of a K block, by part: 6-bit numbers in 12 bytes, times float16 numbers."""
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
        scales = numbers(d, *fours(first, third))
        return scales, numbers(lowest, *fours(second, b.lshr(third, I32(4))))

    def lane(self, x: ir.Value, n: int) -> ir.Value:
        """Number `n` of x for all lanes."""
        return shuffle(self.b, x, [n] * WIDTH)


def _q8_0(block: BlockReader) -> Iterator[BlockPart]:
    yield BlockPart((block.bytes(2, signed=True), block.bytes(18, signed=True)), block.half(0))


def _q4_0(block: BlockReader) -> Iterator[BlockPart]:
    low, high = (block.minus(nibbles, 8) for nibbles in block.nibbles(2))
    yield BlockPart((low, high), block.half(0))


def _q4_1(block: BlockReader) -> Iterator[BlockPart]:
    low, high = block.nibbles(4)
    yield BlockPart((low, high), block.half(0), low=block.half(2))


def _q5_0(block: BlockReader) -> Iterator[BlockPart]:
    yield BlockPart(block.fives(6, 2, 16), block.half(0))


def _q5_1(block: BlockReader) -> Iterator[BlockPart]:
    yield BlockPart(block.fives(8, 4), block.half(0), low=block.half(2))


def _q4_k(block: BlockReader) -> Iterator[BlockPart]:
    yield from _k_parts(block, 16, lambda nibbles, _part, _half: nibbles)


def _q5_k(block: BlockReader) -> Iterator[BlockPart]:
    bits = [block.bytes(16 + LANES * half) for half in range(2)]

    def quants(nibbles: ir.Value, part: int, half: int) -> ir.Value:
        return block.b.or_(nibbles, block.masked(block.shifted(bits[half], 4 - part), 16))

    yield from _k_parts(block, 48, quants)


def _k_parts(block: BlockReader, start: int, quants: Callable[[ir.Value, int, int], ir.Value]) -> Iterator[BlockPart]:
    """The parts of a K block whose nibbles begin at `start`; `quants` makes quants of the nibbles of half a part."""
    scales, lows = block.scales_and_lows()
    for pair in range(4):
        both = [block.bytes(start + PART * pair + LANES * half) for half in range(2)]
        for part in (2 * pair, 2 * pair + 1):
            first, second = (quants(block.nibble(both[half], part % 2 == 1), part, half) for half in range(2))
            yield BlockPart((first, second), block.lane(scales, part), low=block.lane(lows, part), lows=lows)


def _q6_k(block: BlockReader) -> Iterator[BlockPart]:
    b, scale = block.b, block.half(208)
    for half in range(2):
        bits = [block.bytes(128 + PART * half + LANES * n) for n in range(2)]
        bytes_ = [block.bytes(64 * half + LANES * n) for n in range(4)]
        for part in range(4):
            quants, factors = [], []
            for n in range(2):
                nibbles = block.nibble(bytes_[2 * (part % 2) + n], part > 1)
                upper = block.masked(block.shifted(bits[n], 4 - 2 * part), 0x30)
                quants.append(block.minus(b.or_(nibbles, upper), 32))
                factors.append(block.splat(b.sext(block.read(192 + 8 * half + 2 * part + n, _I8), _I16), LANES))
            yield BlockPart((quants[0], quants[1]), scale, (factors[0], factors[1]))


@dataclass(frozen=True)
class BlockFormat:
    """How the blocks of a ggml type are read."""

    weights: int  # of a block
    size: int  # of a block in bytes
    parts: Callable[[BlockReader], Iterator[BlockPart]]


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
NUMBERS = {0: np.float32, 1: np.float16, 24: np.int8, 30: np.uint16}
BLOCK_FORMATS = frozenset(BLOCKS)
FORMATS = BLOCK_FORMATS | {0, 1, 30}
