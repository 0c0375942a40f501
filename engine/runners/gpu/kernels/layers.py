"""What a layer computes beside attention: sums with norms, gates, and products with int8 weights."""

import triton
import triton.language as tl


@triton.jit
def rms_factor(x, size, epsilon):
    """1 over the root mean square of `size` numbers, of which `x` has those that are not 0."""
    return 1.0 / tl.sqrt(tl.sum(x * x, 0) / size + epsilon)


@triton.jit
def add_norm(X, DELTA, AFTER, BEFORE, OUT, epsilon, E: tl.constexpr, BLOCK: tl.constexpr):
    """`Ops.add_norm` for one token a program. Pointers can be None."""
    row = tl.program_id(0).to(tl.int64) * E
    column = tl.arange(0, BLOCK)
    inside = column < E
    x = tl.load(X + row + column, mask=inside, other=0.0)
    if DELTA is not None:
        delta = tl.load(DELTA + row + column, mask=inside, other=0.0).to(tl.float32)
        if AFTER is not None:
            weight = tl.load(AFTER + column, mask=inside, other=0.0)
            delta = delta * rms_factor(delta, E, epsilon) * weight
        x += delta
        tl.store(X + row + column, x, mask=inside)
    if BEFORE is not None:
        weight = tl.load(BEFORE + column, mask=inside, other=0.0)
        x = x * rms_factor(x, E, epsilon) * weight
    tl.store(OUT + row + column, x.to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def gate(GATE_UP, OUT, INNER: tl.constexpr, IS_SILU: tl.constexpr, BLOCK: tl.constexpr):
    """`Ops.gate` for BLOCK numbers of one token a program."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < INNER
    x = tl.load(GATE_UP + row * 2 * INNER + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(GATE_UP + row * 2 * INNER + INNER + column, mask=inside, other=0.0).to(tl.float32)
    if IS_SILU:
        argument = x
    else:  # (1 + tanh(u)) / 2 is the logistic function of 2u
        argument = 2 * 0.7978845608028654 * (x + 0.044715 * x * x * x)
    y = x / (1.0 + tl.exp(-argument)) * up
    tl.store(OUT + row * INNER + column, y.to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def int8_linear(
    X, WEIGHT, SCALE, OUT, N, R, C: tl.constexpr, PRODUCTS: tl.constexpr, N_BLOCK: tl.constexpr, R_BLOCK: tl.constexpr,
    C_BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The product of few tokens with int8 weights: every weight is read once, and widened in registers.

    A program has some rows of the weights, and all tokens.

    Args:
        X: [N, C]. WEIGHT: int8 [R, C]. SCALE: float32 [R]. OUT: [N, R].
        PRODUCTS: the dtype of the factors. int8 is exact in each.
        STAGES: the number of reads in flight.
    """
    n, r = tl.arange(0, N_BLOCK), tl.program_id(0) * R_BLOCK + tl.arange(0, R_BLOCK)
    is_token, is_row = n < N, r < R
    ROW = WEIGHT + r[:, None].to(tl.int64) * C
    sums = tl.zeros([N_BLOCK, R_BLOCK], tl.float32)
    for first in tl.range(0, C, C_BLOCK, num_stages=STAGES):
        c = first + tl.arange(0, C_BLOCK)
        inside = c < C
        x = tl.load(X + n[:, None] * C + c[None], mask=is_token[:, None] & inside[None], other=0.0)
        weight = tl.load(ROW + c[None], mask=is_row[:, None] & inside[None], other=0)
        sums = tl.dot(x.to(PRODUCTS), tl.trans(weight.to(PRODUCTS)), sums, input_precision="tf32x3")
    sums *= tl.load(SCALE + r, mask=is_row, other=0.0)[None]
    tl.store(OUT + n[:, None] * R + r[None], sums.to(OUT.dtype.element_ty), mask=is_token[:, None] & is_row[None])
