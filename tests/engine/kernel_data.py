"""Numbers for the compiled kernels: the bits of one kind, and their values in float64."""

import numpy as np
import torch

KINDS = (np.float32, np.uint16, np.int8)


def bfloat16_bits(x):
    """Float32 numbers rounded to bfloat16 by torch, as uint16."""
    return torch.from_numpy(x).bfloat16().view(torch.int16).numpy().view(np.uint16)


def from_bfloat16(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def stored(random, kind, rows, columns):
    """A random matrix of `kind`, float32 scales of its rows or None, and its values in float64."""
    x = random.standard_normal((rows, columns)).astype(np.float32)
    if kind == np.float32:
        return x, None, x.astype(np.float64)
    if kind == np.uint16:
        return bfloat16_bits(x), None, from_bfloat16(bfloat16_bits(x)).astype(np.float64)
    bits = random.integers(-127, 128, (rows, columns)).astype(np.int8)
    scales = random.uniform(0.002, 0.02, rows).astype(np.float32)
    return bits, scales, bits * scales[:, None].astype(np.float64)


def address(x):
    """The address of an array; 0 for None. The caller keeps the array alive."""
    return 0 if x is None else x.ctypes.data
