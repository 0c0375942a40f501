"""Each vector operation compared with numpy, and bfloat16 with torch."""

import numpy as np
import pytest
from example_count import examples
from hypothesis import given
from hypothesis import strategies as st
from kernel_data import address, bfloat16_bits, from_bfloat16
from numba import njit

from ropewalk.engine.runners.cpu.kernels import simd
from ropewalk.engine.runners.cpu.kernels.simd import load, store

RANDOM = np.random.default_rng(0)


@njit
def widen(kind, x, first, out):
    simd.fetch(kind, x, first, 8)
    store(out, 0, load(kind, x, first))


@njit
def round_to_bfloat16(x, out, first):
    simd.store_bfloat16(out, first, load(np.float32, x, 0))


@njit
def round_to_int8(x, out, first):
    simd.store_int8(out, first, load(np.float32, x, 0))


@njit
def exponentials(x, count, out):
    for i in range(0, count, 8):
        store(out, i, simd.exp(load(np.float32, x, i)))


@njit
def arithmetic(x, y, z, out):
    a, b, c = load(np.float32, x, 0), load(np.float32, y, 0), load(np.float32, z, 0)
    store(out, 0, simd.add(a, b))
    store(out, 8, simd.sub(a, b))
    store(out, 16, simd.mul(a, b))
    store(out, 24, simd.div(a, b))
    store(out, 32, simd.maximum(a, b))
    store(out, 40, simd.fma(a, b, c))
    store(out, 48, simd.splat(simd.get(x, 5)))


@njit
def reduced(x):
    a = load(np.float32, x, 0)
    return simd.total(a), simd.largest(a)


@njit
def eight_totals(x, out):
    a, b, c, d = load(np.float32, x, 0), load(np.float32, x, 8), load(np.float32, x, 16), load(np.float32, x, 24)
    e, f, g, h = load(np.float32, x, 32), load(np.float32, x, 40), load(np.float32, x, 48), load(np.float32, x, 56)
    store(out, 0, simd.totals(a, b, c, d, e, f, g, h))


@njit
def places(x, out):
    simd.store_halves(out, 1, out, 9, load(np.float32, x, 0))
    simd.put(out, 15, simd.get(x, 7))


@njit
def sizes(four, two, one):
    return simd.size_of(four), simd.size_of(two), simd.size_of(one)


def normal(count):
    return RANDOM.standard_normal(count).astype(np.float32)


def test_load_widens_every_kind_exactly():
    floats = normal(24)
    bits = bfloat16_bits(normal(24))
    whole = np.array([-128, -127, -1, 0, 1, 2, 126, 127] * 3, np.int8)
    out = np.empty(8, np.float32)
    for kind, source, expected in (
        (np.float32, floats, floats),
        (np.uint16, bits, from_bfloat16(bits)),
        (np.int8, whole, whole.astype(np.float32)),
    ):
        for first in (0, 3, 16):
            widen(kind, address(source), first, address(out))
            assert np.array_equal(out, expected[first : first + 8])


@examples(300)
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=8, max_size=8))
def test_bfloat16_is_rounded_as_torch_rounds_it(values):
    x = np.array(values, np.float32)
    out = np.zeros(10, np.uint16)
    round_to_bfloat16(address(x), address(out), 1)
    assert np.array_equal(out[1:9], bfloat16_bits(x))
    assert out[0] == out[9] == 0


def test_bfloat16_ties_go_to_even():
    upper = np.array([0x3F80, 0x3F81, 0xBF80, 0xBF81, 0x0001, 0x7F7F, 0x8000, 0x4049], np.uint32)
    out = np.zeros(8, np.uint16)
    for lower, up in ((0x7FFF, 0), (0x8000, None), (0x8001, 1)):
        x = (upper << 16 | lower).view(np.float32)
        round_to_bfloat16(address(x), address(out), 0)
        expected = upper + (upper & 1 if up is None else up)
        assert np.array_equal(out, expected)
        assert np.array_equal(out, bfloat16_bits(x))


@examples(100)
@given(st.lists(st.one_of(st.floats(-127, 127, width=32), st.integers(-127, 126).map(lambda n: n + 0.5)), min_size=8,
                max_size=8))  # fmt: skip
def test_int8_is_rounded_to_the_nearest_with_ties_to_even(values):
    x = np.array(values, np.float32)
    out = np.full(10, 99, np.int8)
    round_to_int8(address(x), address(out), 1)
    assert np.array_equal(out[1:9], np.rint(x))
    assert out[0] == out[9] == 99


def test_exp_within_2e_7_of_its_value():
    x = np.concatenate([np.linspace(-87, 88, 400_000), np.linspace(-1, 1, 99_999), [0]]).astype(np.float32)
    out = np.empty_like(x)
    exponentials(address(x), len(x), address(out))
    exact = np.exp(x.astype(np.float64))
    assert np.abs(out / exact - 1).max() < 2e-7
    assert out[-1] == 1


def test_exp_is_limited_at_both_ends():
    x = np.array([-np.inf, -1e30, -87.01, -87, 88, 88.01, 1e30, np.inf], np.float32)
    out = np.empty_like(x)
    exponentials(address(x), 8, address(out))
    assert np.array_equal(out[:4], np.repeat(out[3], 4))
    assert np.array_equal(out[4:], np.repeat(out[4], 4))
    assert np.allclose(out[3:5], np.exp(np.array([-87.0, 88.0])), rtol=2e-7, atol=0)


def test_arithmetic():
    x, y, z = normal(8), normal(8), normal(8)
    z[:4] = -(x * y)[:4]  # the result is the rounding error of the product, which only a fused sum shows
    out = np.empty(56, np.float32)
    arithmetic(address(x), address(y), address(z), address(out))
    fused = (x.astype(np.float64) * y + z).astype(np.float32)
    assert np.array_equal(out, np.concatenate([x + y, x - y, x * y, x / y, np.maximum(x, y), fused, [x[5]] * 8]))


@pytest.mark.parametrize("sign", [-1, 1])
def test_total_has_one_order_and_largest_finds_the_largest(sign):
    for _ in range(50):
        x = sign * np.abs(normal(8)) * np.float32(10) ** RANDOM.integers(-3, 4, 8).astype(np.float32)
        total, largest = reduced(address(x))
        halves = x[:4] + x[4:]
        quarters = halves[:2] + halves[2:]
        assert total == quarters[0] + quarters[1]
        assert largest == x.max()


def test_totals_are_the_sums_of_the_vectors_in_order():
    x = normal(64)
    out = np.empty(8, np.float32)
    eight_totals(address(x), address(out))
    assert np.allclose(out, x.reshape(8, 8).sum(1, dtype=np.float64), rtol=0, atol=2e-6)


def test_halves_and_single_numbers_are_written_to_their_places():
    x, out = normal(8), np.zeros(17, np.float32)
    places(address(x), address(out))
    assert np.array_equal(out, [0, *x[:4], 0, 0, 0, 0, *x[4:], 0, 0, x[7], 0])


def test_size_of_is_in_bytes():
    assert sizes(np.float32, np.uint16, np.int8) == (4, 2, 1)
