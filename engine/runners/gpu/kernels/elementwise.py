"""The kernels between the matrix products of a decode step: sum and norms, and the gate of an MLP."""

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
