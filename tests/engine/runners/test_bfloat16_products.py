"""Chunks whose products are bfloat16: attention against float64, and whole models against float32 products."""

import functools
import math
import sys

import numpy as np
import pytest
import torch
from decoders import DECODERS, LENGTH, SPECS, compiled, difference, in_bfloat16, in_chunks, read

import ropewalk as rw
from ropewalk.engine.attention.kernel import AttentionScore
from ropewalk.engine.attention.rows import KeyRun
from ropewalk.engine.model import Model
from ropewalk.engine.runners.choose import RunnerOptions
from ropewalk.engine.runners.chunk_attention import ChunkAttention
from ropewalk.engine.runners.cpu import bfloat16_attention
from ropewalk.engine.runners.cpu.bfloat16_attention import BFloat16Attention, Softmax, in_groups
from ropewalk.engine.runners.cpu.kernels import HAS_BFLOAT16_PRODUCTS, flash
from ropewalk.engine.runners.cpu.kernels.tile_products import may_use_amx

pytestmark = pytest.mark.usefixtures("freed_memory_is_overwritten")

ROUNDING = 2.0**-8  # half a step of bfloat16 for a weight, and as much again for what is not rounded to the nearest


@pytest.fixture(params=[False, True][: 1 + may_use_amx()], ids=["no-amx", "amx"][: 1 + may_use_amx()])
def amx(request, monkeypatch):
    """Whether AMX multiplies, on CPUs that have it."""
    monkeypatch.setattr(sys.modules[flash.__module__], "may_use_amx", lambda: request.param)
    return request.param


def numbers(*shape, seed, scale=1.0):
    return (torch.randn(shape, generator=torch.manual_seed(seed)) * scale).bfloat16()


def in_float64(q, k, v, lows, highs, softcap):
    """Softmax attention of q [H, N, D] over the keys that each query sees, and the same of the values' magnitudes."""
    group = len(q) // len(k)
    k, v = (x.double().repeat_interleave(group, 0) for x in (k, v))
    scores = q.double() @ k.transpose(1, 2) * math.log(2)  # the kernel's scores are powers of 2
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    keys = torch.arange(k.shape[1])
    seen = (lows[:, None] <= keys) & (keys < highs[:, None])
    weights = torch.softmax(scores.masked_fill(~seen, -torch.inf), -1)
    return weights @ v, weights @ v.abs()


def in_bands(q, k, v, bands, softcap, piece):
    """The same by the kernel, in several bands and several pieces of the keys."""
    state = Softmax(q.shape, len(k), softcap, threads=2)
    queries = state.packed(q.float())
    for start in range(0, k.shape[1], piece):
        stop = min(start + piece, k.shape[1])
        values = in_groups(v[:, start:stop])
        for lows, highs in bands:
            state.add(queries, k, 0, values, start, lows.clamp(start, stop), highs.clamp(start, stop))
    return state.result()


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize(
    ("H", "K", "N", "M", "D", "piece"),
    [
        (1, 1, 1, 1, 16, 32),
        (3, 1, 70, 333, 48, 1024),
        (4, 2, 64, 257, 80, 64),
        (6, 3, 33, 128, 64, 32),
        (4, 2, 70, 1500, 96, 2048),
    ],
)
def test_the_kernel_is_softmax_attention_to_the_rounding_of_its_weights(H, K, N, M, D, piece, softcap, amx):
    """For any range of keys of each query, cut into two bands at any key, and for any pieces of the keys."""
    q, k, v = numbers(H, N, D, seed=1, scale=0.5), numbers(K, M, D, seed=2), numbers(K, M, D, seed=3)
    random = np.random.default_rng(M)
    lows = torch.from_numpy(random.integers(0, M, N)).int()
    highs = torch.from_numpy(random.integers(lows.numpy() + 1, M + 1)).int()
    cuts = torch.from_numpy(random.integers(lows.numpy(), highs.numpy() + 1)).int()  # either band may be empty
    expected, magnitude = in_float64(q, k, v, lows, highs, softcap)
    for bands in ([(lows, highs)], [(cuts, highs), (lows, cuts)]):
        out = in_bands(q, k, v, bands, softcap, piece)
        assert ((out - expected).abs() <= ROUNDING * magnitude + 1e-6).all()


def test_large_scores_neither_overflow_nor_hide_a_late_peak(amx):
    """Scores of thousands, whose largest is the last one that is read."""
    q, v = torch.ones(1, 1, 32).bfloat16() / 2, numbers(1, 300, 32, seed=4)
    k = torch.linspace(-500, 500, 300)[None, :, None].expand(1, 300, 32).bfloat16()
    whole = torch.tensor([0]).int(), torch.tensor([300]).int()
    out = in_bands(q, k, v, [whole], None, 1024)
    expected, _ = in_float64(q, k, v, *whole, None)
    assert torch.allclose(out.double(), expected, atol=1e-2)


def attention_of(kind, runner, spec, past, count, cache):
    """Attention of `count` random queries after `past` random keys, and what the layer then holds."""
    rotation = runner._rotations[0]
    chunk = kind(rotation, KeyRun(None, 0, count, 0, past + count, 0))
    d = runner._decoder
    layer = runner.new_cache(8).layers[0]
    k, v = (torch.randn(1, d.key_heads, past + count, d.head_dim, generator=torch.manual_seed(n)) for n in (5, 6))
    q = torch.randn(1, d.heads, count, d.head_dim, generator=torch.manual_seed(7)) * 0.2
    k, v, q = (x.to(cache).float() for x in (k, v, q))
    layer.update(k[:, :, :past], v[:, :, :past])
    out = chunk.attend(q, k[:, :, past:], v[:, :, past:], layer, AttentionScore(scale=0.25))
    return out, layer.keys[:, :, : layer.length].float()


@pytest.fixture(scope="module")
def llama_runner():
    return compiled(DECODERS["llama"]())


@pytest.mark.parametrize(("past", "count"), [(0, 100), (77, 63)])
@pytest.mark.parametrize("spec", SPECS)
def test_every_scaler_sees_the_same_keys_as_with_float32_products(llama_runner, spec, past, count):
    """Scores are small, so that a key too many or too few changes the result by more than the rounding does."""
    llama_runner.use(rw.scaling.parse(spec), LENGTH)
    expected, keys = attention_of(ChunkAttention, llama_runner, spec, past, count, torch.bfloat16)
    out, same_keys = attention_of(BFloat16Attention, llama_runner, spec, past, count, torch.bfloat16)
    assert torch.equal(keys, same_keys)
    assert out.shape == expected.shape and difference(out, expected) < 6e-3


@pytest.mark.parametrize(
    "spec", ["none", "rerope:20|logn", "self-extend:4,window=20", "dpe:4/2,window=20", "jet-long:20"]
)
def test_values_in_small_pieces(llama_runner, spec, monkeypatch):
    llama_runner.use(rw.scaling.parse(spec), LENGTH)
    whole, _ = attention_of(BFloat16Attention, llama_runner, spec, 77, 63, torch.bfloat16)
    monkeypatch.setattr(bfloat16_attention, "_PIECE", 64)
    pieces, _ = attention_of(BFloat16Attention, llama_runner, spec, 77, 63, torch.bfloat16)
    assert not torch.equal(pieces, whole) and difference(pieces, whole) < 4e-3


@pytest.mark.parametrize("name", DECODERS)
def test_every_family_is_nearer_to_float32_products_than_transformers_in_bfloat16(name):
    hf = in_bfloat16(DECODERS[name]())
    exact, rounded = (compiled(hf, precision=precision) for precision in ("float32", "bfloat16"))
    transformers = read(hf).float()
    for sizes in ([1000], [50, 1, 40]):
        expected = in_chunks(exact, sizes)
        assert 0 < (in_chunks(rounded, sizes) - expected).norm() < (transformers - expected).norm()


@pytest.mark.parametrize("options", [{"cache": "int8"}, {"cache": "float32"}, {"weights": "int8"}], ids=str)
def test_other_caches_and_weights(options):
    hf = DECODERS["llama"]()
    expected, found = (
        in_chunks(compiled(hf, precision=precision, **options), [60, 1]) for precision in ("float32", "bfloat16")
    )
    assert 0 < float((found - expected).norm() / expected.norm()) < 0.08  # the weights are rounded, too


def test_steps_and_logits_stay_float32(tiny_folder):
    """A single token, and the product with the output layer, are the same bits under every precision."""
    hf = in_bfloat16(DECODERS["llama"]())
    exact, rounded = (compiled(hf, precision=precision) for precision in ("float32", "bfloat16"))
    assert torch.equal(in_chunks(exact, [1]), in_chunks(rounded, [1]))
    x = torch.randn(5, hf.config.hidden_size, generator=torch.manual_seed(0))
    assert torch.equal(exact._layers.logits(x), rounded._layers.logits(x))


def test_the_precision_that_is_chosen():
    wide, narrow = DECODERS["llama"], functools.partial(lambda: in_bfloat16(DECODERS["llama"]()))
    fast = "bfloat16" if HAS_BFLOAT16_PRODUCTS else "float32"

    def products(hf, **options):
        return str(compiled(hf, **{"precision": "auto", **options})._products).removeprefix("torch.")

    assert products(wide()) == products(wide(), cache="int8") == products(narrow(), precision="float32") == "float32"
    assert products(narrow()) == products(narrow(), cache="float32") == products(wide(), weights="int8") == fast
    assert products(wide(), precision="bfloat16") == "bfloat16"
    runner = compiled(narrow(), precision="bfloat16")
    assert runner.precision == "bfloat16, bfloat16 cache, bfloat16 prefill"
    assert "products of chunks in bfloat16" in runner.how


def test_a_precision_needs_the_kernels(tiny_folder):
    with pytest.raises(rw.ConfigError, match="unknown precision 'bf16'"):
        RunnerOptions(precision="bf16")
    with pytest.raises(rw.ConfigError, match="precision and offload need the compiled kernels"):
        RunnerOptions(precision="bfloat16", compile=False)
    model = rw.load(tiny_folder, precision="bfloat16")
    assert isinstance(model, Model) and "bfloat16 prefill" in model.precision
    assert "bfloat16 prefill" not in rw.load(tiny_folder).precision
