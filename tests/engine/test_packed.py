"""Weights in the blocks of a GGUF file: unpacked by the kernels and without them, as by the gguf library."""

import gguf
import numpy as np
import pytest
import torch
from kernel_data import FORMATS, packed

from ropewalk.engine.packed import PackedEmbedding, PackedLinear, PackedWeight


def bits(x):
    return x.numpy().view(np.int32)


@pytest.fixture(params=["compiled", "gguf"])
def unpacked_by(request, monkeypatch):
    if request.param == "gguf":
        monkeypatch.setattr("ropewalk.engine.packed.BLOCK_FORMATS", frozenset())


@pytest.mark.usefixtures("unpacked_by")
@pytest.mark.parametrize("name", FORMATS)
def test_weights_have_the_bits_that_the_gguf_library_gives(name):
    weight, expected = packed(np.random.default_rng(0), name, 37, 512)
    assert weight.shape == (37, 512)
    assert np.array_equal(bits(weight.unpack()), expected.view(np.int32))
    assert np.array_equal(bits(weight[3:20].unpack()), expected[3:20].view(np.int32))
    out = torch.empty(37, 512)
    assert weight.unpack(out) is out and np.array_equal(bits(out), expected.view(np.int32))


@pytest.mark.usefixtures("unpacked_by")
@pytest.mark.parametrize("name", FORMATS)
def test_weights_are_rounded_to_bfloat16_as_float32_numbers_are(name):
    weight, _ = packed(np.random.default_rng(0), name, 37, 512)
    check_rounded(weight)


def check_rounded(weight):
    """Rows of a larger bfloat16 tensor get the weights rounded by torch, and its other rows stay."""
    rows, columns = weight.shape
    out = torch.full((rows + 2, columns), 7.0, dtype=torch.bfloat16)
    weight.unpack(out[1:-1])
    expected = weight.unpack().bfloat16()
    assert torch.equal(out[1:-1].view(torch.int16), expected.view(torch.int16))
    assert (out[[0, -1]] == 7).all()


def test_ties_are_rounded_to_even():
    """Quants are powers of two, and scales have nine bits: weights lie between two bfloat16 numbers."""
    scales = np.array([[257, 259]] * 4, np.float16).reshape(8, 1) / np.float16(256)
    quants = np.tile(np.int8([1, -1, 2, 64]), (8, 8))
    blocks = np.concatenate([scales.view(np.uint8), quants.view(np.uint8)], 1)
    weight = PackedWeight(torch.from_numpy(blocks), gguf.GGMLQuantizationType.Q8_0)
    assert set((bits(weight.unpack()) & 0x1FFFF).flatten()) == {0x08000, 0x18000}, "ties, below them even and odd bits"
    check_rounded(weight)


@pytest.mark.parametrize("name", FORMATS)
def test_extreme_scales_are_unpacked_exactly(name):
    """Zeros, denormal and the largest float16 numbers, of both signs."""
    weight, _ = packed(np.random.default_rng(0), name, 8, 256)
    if weight.format.name in ("F32", "F16", "BF16"):
        return
    size = gguf.GGML_QUANT_SIZES[weight.format][1]
    blocks = weight.data.numpy().reshape(-1, size)
    place = 208 if name == "Q6_K" else 0
    values = np.array([0.0, -0.0, 6e-8, -6e-8, 3e-5, 65504.0, -65504.0, 1.0], np.float16)
    blocks[:, place : place + 2] = np.resize(values, len(blocks)).view(np.uint8).reshape(-1, 2)
    expected = gguf.dequantize(weight.data.numpy(), weight.format)
    assert np.array_equal(bits(weight.unpack()), expected.view(np.int32))
    check_rounded(weight)


def test_formats_without_a_kernel_are_unpacked_by_the_library():
    format_ = gguf.GGMLQuantizationType.Q2_K
    data = np.random.default_rng(0).integers(0, 120, (5, 84), dtype=np.uint8)
    assert np.array_equal(bits(PackedWeight(torch.from_numpy(data), format_).unpack()), bits_of(data, format_))


def bits_of(data, format_):
    return gguf.dequantize(data, format_).view(np.int32)


def test_a_large_matrix_is_unpacked_in_parts(monkeypatch):
    monkeypatch.setattr("ropewalk.engine.packed._WEIGHTS_AT_A_TIME", 5 * 256)
    weight, expected = packed(np.random.default_rng(0), "Q4_K", 12, 256)
    x, bias = torch.randn(3, 256), torch.randn(12)
    product = torch.nn.functional.linear(x, torch.from_numpy(expected), bias)
    sizes, unpack = [], PackedWeight.unpack
    monkeypatch.setattr(PackedWeight, "unpack", lambda self: sizes.append(self.shape[0]) or unpack(self))
    assert torch.allclose(PackedLinear(weight, bias)(x), product, rtol=1e-5, atol=1e-5)
    assert sizes == [5, 5, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_weights_are_expanded_in_parts(monkeypatch, dtype):
    monkeypatch.setattr("ropewalk.engine.packed._WEIGHTS_AT_A_TIME", 5 * 256)
    weight, expected = packed(np.random.default_rng(0), "Q4_K", 12, 256)
    assert torch.equal(weight.expanded(dtype), torch.from_numpy(expected).to(dtype))


def test_modules_compute_what_their_weights_say():
    random = np.random.default_rng(0)
    weight, expected = packed(random, "Q4_K", 12, 256)
    x, bias = torch.randn(3, 256), torch.randn(12)
    product = torch.nn.functional.linear(x, torch.from_numpy(expected), bias)
    assert torch.equal(PackedLinear(weight, bias)(x), product)
    ids = torch.tensor([[3, 0], [11, 3]])
    assert torch.equal(PackedEmbedding(weight)(ids), torch.from_numpy(expected)[ids])
