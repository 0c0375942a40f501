"""Numbers for the compiled kernels: the bits of one kind or format, and their values; and calls of inner kernels."""

from functools import cache

import gguf
import numpy as np
import torch
from numba import njit

from ropewalk.engine.packed import PackedWeight
from ropewalk.engine.runners.cpu.kernels import project
from ropewalk.engine.runners.cpu.kernels.blocks import room
from ropewalk.engine.runners.cpu.kernels.team import new_team

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


@cache
def from_python(kernel):
    """A function of Python that calls a kernel which only other kernels can call."""
    return njit(lambda *args: kernel(*args))


def products(linears, x, out, threads):
    """`project` by one of `threads` threads, which takes all rows."""
    vectors = np.empty(room(*x.shape, 2), np.int16)
    from_python(project)(linears, x, out, address(vectors), new_team(1), 0, threads)


def address(x):
    """The address of an array; 0 for None. The caller keeps the array alive."""
    return 0 if x is None else x.ctypes.data


_SCALES = {
    "Q4_0": (0.01, [0]),
    "Q4_1": (0.01, [0, 2]),
    "Q5_0": (0.005, [0]),
    "Q5_1": (0.005, [0, 2]),
    "Q8_0": (0.0007, [0]),
    "Q4_K": (0.0003, [0, 2]),
    "Q5_K": (0.00015, [0, 2]),
    "Q6_K": (0.00004, [208]),
}
"""The size of the scales that gives weights of about 0.05, and where a block has them."""

PLAIN = ("F32", "F16", "BF16")
FORMATS = (*_SCALES, *PLAIN)


def packed(random, name, rows, columns):
    """A random matrix of a ggml type, and its float32 values by the gguf library."""
    format_ = gguf.GGMLQuantizationType[name]
    if name in PLAIN:
        data = gguf.quantize(0.05 * random.standard_normal((rows, columns)).astype(np.float32), format_)
        data = np.ascontiguousarray(data).view(np.uint8)
    else:
        count, size = gguf.GGML_QUANT_SIZES[format_]
        data = random.integers(0, 256, (rows * columns // count, size), dtype=np.uint8)
        scale, places = _SCALES[name]
        for place, factor in zip(places, (scale, -7 * scale if name.endswith("_1") else 7 * scale), strict=False):
            halves = (factor * random.uniform(0.5, 1.5, len(data))).astype(np.float16)
            data[:, place : place + 2] = halves.view(np.uint8).reshape(-1, 2)
        data = data.reshape(rows, -1)
    return PackedWeight(torch.from_numpy(data), format_), gguf.dequantize(data, format_)


def check_bits(run, x):
    """Products have the same bits for any tokens beside theirs and for any number of threads.

    Args:
        run: the products of some tokens, [n, rows]; it takes `threads=`.
        x: nine tokens.
    """
    whole = run(x)
    for tokens in range(1, 10):
        assert np.array_equal(run(x[:tokens]), whole[:tokens])
        assert np.array_equal(run(x[9 - tokens :]), whole[9 - tokens :])
    for threads in (2, 3, 7, 40):
        assert np.array_equal(run(x, threads=threads), whole)
