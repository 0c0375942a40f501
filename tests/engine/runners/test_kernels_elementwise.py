"""The elementwise kernels of a step: norms, activations, rotation and cache writes, compared with float64 and torch."""

import numpy as np
import pytest
import torch
from kernel_data import KINDS, address, bfloat16_bits, from_bfloat16, from_python

from ropewalk.engine.attention.rotation import Angles, Layout
from ropewalk.engine.runners.cpu.kernels import elementwise as kernels

EPSILON = np.float32(1e-2)  # large enough to change results


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def rms(x, weight):
    x = x.astype(np.float64)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + float(EPSILON)) * weight


def close(one, other, tolerance=1e-6):
    return np.abs(one - other).max() < tolerance * np.abs(other).max()


@pytest.mark.parametrize("size", [16, 48, 960])
def test_norms(size):
    x, weight = normal(3, size) * np.float32([[0.01], [1], [100]]), normal(size, seed=1)
    out = np.empty((3, size), np.float32)
    from_python(kernels.rms_norm)(x, address(weight), EPSILON, out)
    for row, expected in zip(out, rms(x, weight), strict=True):
        assert close(row, expected)
    from_python(kernels.rms_norm)(x, 0, EPSILON, out)
    assert np.array_equal(out, x)
    from_python(kernels.rms_norm)(x, address(weight), EPSILON, x)  # in place, like the last norm
    assert close(x, rms(normal(3, size) * np.float32([[0.01], [1], [100]]), weight))


@pytest.mark.parametrize("normed", [False, True])
def test_what_is_added_is_normed_first_if_there_is_a_norm(normed):
    x, residual, weight = normal(4, 48), normal(4, 48, seed=1), normal(48, seed=2)
    expected = residual + (rms(x, weight) if normed else x)
    from_python(kernels.add_to_residual)(x, address(weight) if normed else 0, EPSILON, residual, np.empty_like(x))
    assert close(residual, expected)


def shape_of(H, K, D, together=0, layout=None):
    layout = layout or Layout(0, D, False)
    return np.array([H, K, D, 0, together, layout.start, layout.dim, layout.interleaved], np.int64)


@pytest.mark.parametrize("together", [0, 1])
@pytest.mark.parametrize("which", ["both", "queries", "keys", "none"])
def test_queries_and_keys_are_normed_by_heads_or_together(together, which):
    H, K, D = 6, 2, 16
    qkv = normal(3, (H + 2 * K) * D) * np.repeat(np.arange(1, 11), D).astype(np.float32)
    q, k, v = np.split(qkv.copy(), [H * D, (H + K) * D], axis=1)
    weights = [normal(heads * D if together else D, seed=1) for heads in (H, K)]
    used = which in ("both", "queries"), which in ("both", "keys")
    norms = np.array([0, 0, 0, 0, *(address(w) * u for w, u in zip(weights, used, strict=True))], np.int64)
    from_python(kernels.norm_heads)(shape_of(H, K, D, together), norms, EPSILON, qkv)
    expected = []
    for x, heads, weight, use in zip((q, k), (H, K), weights, used, strict=True):
        by_head = x if together else x.reshape(3, heads, D)
        expected.append(rms(by_head, weight).reshape(x.shape) if use else x)
    assert close(qkv, np.concatenate([*expected, v], 1))


@pytest.mark.parametrize("name", ["silu", "gelu_tanh"])
def test_activations(name):
    gate = np.concatenate([np.linspace(-120, 120, 2000), np.linspace(-3, 3, 2000)]).astype(np.float32).reshape(2, -1)
    up = normal(*gate.shape)
    out = np.empty_like(gate)
    activation = {"silu": kernels.SILU, "gelu_tanh": kernels.GELU_TANH}[name]
    for start, stop in ((0, 32), (32, gate.shape[1])):
        from_python(kernels.gate)(np.concatenate([gate, up], 1), activation, out, start, stop)
    exact = torch.from_numpy(gate).double()
    exact = torch.nn.functional.silu(exact) if name == "silu" else torch.nn.functional.gelu(exact, approximate="tanh")
    assert np.allclose(out, exact.numpy() * up, rtol=1e-6, atol=1e-6)


LAYOUTS = [Layout(start, dim, neighbours) for start, dim in ((0, 32), (0, 8), (8, 24)) for neighbours in (False, True)]


def turns_of(bands, tokens, half, seed=0):
    angle = np.random.default_rng(seed).uniform(-3, 3, (bands, tokens, half))
    return (1.3 * np.stack([np.cos(angle), np.sin(angle)], 2)).astype(np.float32)  # with a factor, as YaRN's


def rotated(layout, x, rotation):
    """x [tokens, heads, D] rotated by cosines and sines [tokens, 2, half]."""
    cos, sin = (torch.from_numpy(rotation[:, None, n]).double() for n in (0, 1))
    return layout.rotate(torch.from_numpy(x).double(), Angles(cos, sin)).numpy()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_queries_are_rotated_for_every_band_and_scaled(layout):
    H, K, D, n = 3, 1, 32, 4
    qkv, rotation = normal(n, (H + 2 * K) * D), turns_of(3, n, layout.dim // 2)
    scales = np.array([0.5, 1, 2, 3], np.float32)
    queries = np.empty((3, n, H, D), np.float32)
    from_python(kernels.rotate_queries)(shape_of(H, K, D, layout=layout), qkv, rotation, scales, queries, 0, 1)
    from_python(kernels.rotate_queries)(shape_of(H, K, D, layout=layout), qkv, rotation, scales, queries, 1, n)
    for band in range(3):
        expected = rotated(layout, qkv[:, : H * D].reshape(n, H, D), rotation[band]) * scales[:, None, None]
        assert close(queries[band], expected)


@pytest.mark.parametrize("layout", LAYOUTS[1::2])
@pytest.mark.parametrize("kind", KINDS)
def test_rotated_keys_and_values_are_written_to_their_places(layout, kind):
    H, K, D, n = 4, 2, 32, 3
    qkv, rotation = normal(n, (H + 2 * K) * D), turns_of(1, n, layout.dim // 2)[0]
    qkv[1, (H + K) * D : (H + K + 1) * D] = 0  # a value of zeros
    places, capacities = np.array([5, 0, 2]), [7, 9]
    held = [np.full((n, K, room, D), 3, kind) for room in capacities]
    scales = [np.full((n, K, room), 3, np.float32) for room in capacities]
    buffers = np.zeros((n, 2, 3), np.int64)
    for t in range(n):
        for which, room in enumerate(capacities):
            buffers[t, which] = address(held[which][t]), address(scales[which][t]) if kind == np.int8 else 0, room
    shape, size = shape_of(H, K, D, layout=layout), np.dtype(kind).itemsize
    from_python(kernels.write_keys_values)(shape, size, qkv, rotation, places, buffers, 0, 2)
    from_python(kernels.write_keys_values)(shape, size, qkv, rotation, places, buffers, 2, n)
    keys, values = (qkv[:, (H + part * K) * D :][:, : K * D].reshape(n, K, D) for part in (0, 1))
    for which, expected in enumerate([rotated(layout, keys, rotation), values]):
        for t in range(n):
            rows, row_scales = held[which][t], scales[which][t]
            others = np.delete(rows, places[t], 1)
            assert (others == 3).all()
            written, exact = rows[:, places[t]], expected[t]
            if kind == np.int8:
                assert np.allclose(row_scales[:, places[t]], np.abs(exact).max(1) / 127, rtol=1e-6, atol=0)
                assert (np.delete(row_scales, places[t], 1) == 3).all()
                steps = row_scales[:, places[t], None]
                assert (np.abs(written * steps.astype(np.float64) - exact) <= 0.501 * steps).all()
            elif kind == np.uint16:
                rounded = from_bfloat16(bfloat16_bits(exact.astype(np.float32)))
                assert np.allclose(from_bfloat16(written), rounded, rtol=2**-7, atol=0)
                assert (from_bfloat16(written) == rounded).mean() > 0.95  # float32 may fall on either side of a tie
            else:
                assert np.allclose(written, exact, rtol=0, atol=1e-6)
