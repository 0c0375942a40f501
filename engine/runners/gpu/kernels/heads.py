"""The kernel between the projections and attention: norms of heads, the rotation of keys, and writing the cache."""

import triton
import triton.language as tl

from .layers import rms_factor
from .memory import address_of

_ROUND: tl.constexpr = tl.constexpr(
    1.5 * 2**23
)  # adding and subtracting it rounds a float32 to an integer, as torch does


@triton.jit
def rotary_pairs(d, START: tl.constexpr, DIM: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The pair of every number of a head.

    Returns:
        Whether the number is rotated, the index of its pair, the other number of the pair (itself if it is not
        rotated), and the sign of the other number's part.
    """
    rotated = (d >= START) & (d < START + DIM)
    if INTERLEAVED:
        is_second = (d - START) % 2 == 1
        pair = (d - START) // 2
        other = tl.where(is_second, d - 1, d + 1)
    else:
        is_second = d >= START + DIM // 2
        pair = tl.where(is_second, d - START - DIM // 2, d - START)
        other = tl.where(is_second, d - DIM // 2, d + DIM // 2)
    return rotated, pair, tl.where(rotated, other, d), tl.where(is_second, 1.0, -1.0)


@triton.jit
def normed(
    x, ROW, WEIGHT, head, at, inside, epsilon, COUNT: tl.constexpr, D: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The factor and the weights of the RMS norm of one head.

    Args:
        x: all numbers of the head.
        ROW: all COUNT heads of the token, which the norm is over if WHOLE.
        at: the numbers whose weights to return.
    """
    if WHOLE:
        column = tl.arange(0, BLOCK)
        every = tl.load(ROW + column, mask=column < COUNT * D, other=0.0).to(tl.float32)
        factor = rms_factor(every, COUNT * D, epsilon)
        weight = tl.load(WEIGHT + head * D + at, mask=inside, other=0.0)
    else:
        factor = rms_factor(x, D, epsilon)
        weight = tl.load(WEIGHT + at, mask=inside, other=0.0)
    return factor * weight


@triton.jit
def write(x, ADDRESSES, slot, head, d, inside, D: tl.constexpr, NUMBER: tl.constexpr):
    """Write a row of a head into the buffer whose address, address of scales and capacity ADDRESSES points to."""
    row = head * tl.load(ADDRESSES + 2) + slot
    numbers = address_of(ADDRESSES, NUMBER) + row * D + d
    if NUMBER == tl.int8:
        step = tl.div_rn(tl.max(tl.abs(x), 0), 127.0)
        code = tl.div_rn(x, tl.maximum(step, 1e-30))
        tl.store(numbers, ((code + _ROUND) - _ROUND).to(tl.int8), mask=inside)
        tl.store(address_of(ADDRESSES + 1, tl.float32) + row, step)
    else:
        tl.store(numbers, x.to(NUMBER), mask=inside)


@triton.jit
def heads(
    QKV, QUERY_NORM, KEY_NORM, ANGLES, ADDRESSES, SLOTS, Q, stride, epsilon, FIRST: tl.constexpr, H: tl.constexpr,
    K: tl.constexpr, D: tl.constexpr, WHOLE: tl.constexpr, START: tl.constexpr, DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr, NUMBER: tl.constexpr, BLOCK: tl.constexpr, Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr,
):  # fmt: skip
    """`Ops.heads` for one head of one token a program, from head FIRST on: queries, then keys, then values."""
    n, head = tl.program_id(0).to(tl.int64), tl.program_id(1) + FIRST
    ROW = QKV + n * stride
    d = tl.arange(0, BLOCK)
    inside = d < D
    x = tl.load(ROW + head * D + d, mask=inside, other=0.0).to(tl.float32)
    if head < H:
        if QUERY_NORM is not None:
            x *= normed(x, ROW, QUERY_NORM, head, d, inside, epsilon, H, D, WHOLE, Q_BLOCK)
            tl.store(Q + (n * H + head) * D + d, x.to(Q.dtype.element_ty), mask=inside)
    elif head < H + K:
        rotated, pair, other, sign = rotary_pairs(d, START, DIM, INTERLEAVED)
        y = tl.load(ROW + head * D + other, mask=inside, other=0.0).to(tl.float32)
        if KEY_NORM is not None:
            y *= normed(x, ROW + H * D, KEY_NORM, head - H, other, inside, epsilon, K, D, WHOLE, K_BLOCK)
            x *= normed(x, ROW + H * D, KEY_NORM, head - H, d, inside, epsilon, K, D, WHOLE, K_BLOCK)
        if DIM > 0:
            COS = ANGLES + n * DIM + pair
            cos = tl.load(COS, mask=rotated, other=1.0)
            sin = tl.load(COS + DIM // 2, mask=rotated, other=0.0)
            x = x * cos + sign * y * sin
        write(x, ADDRESSES + n * 6, tl.load(SLOTS + n), head - H, d, inside, D, NUMBER)
    else:
        write(x, ADDRESSES + n * 6 + 3, tl.load(SLOTS + n), head - H - K, d, inside, D, NUMBER)
