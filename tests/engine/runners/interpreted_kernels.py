"""The Triton kernels in Triton's interpreter, compared with the same operations in torch.

The interpreter must be chosen before Triton is imported, so `test_gpu_kernels.py` runs this file in a process of its
own. It cuts float32 to bfloat16 where a GPU rounds.
"""

import pytest
import torch
from decode_steps import MAPS, DecodeStep, difference, random_layer
from decoders import DECODERS, IDS, in_chunks
from triton.runtime.errors import OutOfResources

from ropewalk.engine.attention.rotation import Layout
from ropewalk.engine.rotary_site import rotary_sites
from ropewalk.engine.runners.gpu.kernels import ops as wrappers
from ropewalk.engine.runners.gpu.kernels.ops import TritonOps
from ropewalk.engine.runners.gpu.ops import CacheRows
from ropewalk.engine.runners.gpu.reference import TorchOps
from ropewalk.engine.runners.gpu.runner import GpuRunner
from ropewalk.scaling.spec import parse

KERNELS, TWIN = TritonOps(), TorchOps()
BF16 = torch.bfloat16
PART, NEIGHBOURS = Layout(4, 10, False), Layout(2, 12, True)
FLOAT32 = 1e-6
TEXT = {"lengths": (90,), "tokens": (1,)}


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The interpreter runs one program after the other."""
    monkeypatch.setattr(wrappers, "_PROGRAMS_PER_PROCESSOR", 0)
    monkeypatch.setattr(wrappers, "_FEWEST_SHARES", 3)


def test_what_triton_raises():
    """It is no RuntimeError."""
    assert issubclass(OutOfResources, wrappers.KernelError)


def is_close(got, expected):
    """Equal to the rounding of their dtype."""
    assert got.shape == expected.shape and got.dtype == expected.dtype
    if got.dtype == torch.float32:
        return difference(got, expected) < FLOAT32
    return bool(((got.float() - expected.float()).abs() <= expected.float().abs() * 2**-7 + 1e-6).all())


@pytest.mark.parametrize("spec", MAPS)
def test_every_map(spec):
    step = DecodeStep.random(spec, **TEXT)
    got = step.run(KERNELS)
    assert is_close(got, step.run(TWIN)) and difference(got, step.expected()) < 2e-6


@pytest.mark.parametrize(
    "case",
    [
        {"lengths": (97, 150, 1), "tokens": (1, 2, 1)},
        {"window": 33},
        {"softcap": 5.0, "size": 4.0},
        {"layout": PART, "H": 6, "K": 2, "spec": "rerope:20"},
        {"layout": NEIGHBOURS, "D": 20, "spec": "self-extend:4,window=20"},
        {"layout": None},
        {"H": 15, "K": 3, "D": 80, "layout": Layout(0, 24, False)},
        {"paths": [[0], [0, 1], [2]], "spec": "rerope:20"},
        {"cache": torch.int8, "spec": "rerope:20"},
        {"cache": BF16},
        {"dtype": BF16, "spec": "rerope:20"},
        {"dtype": BF16, "cache": torch.int8},
        {"dtype": torch.float16},
    ],
    ids=str,
)
def test_every_form_of_attention(case):
    step = DecodeStep.random(**(TEXT | case))
    assert is_close(step.run(KERNELS), step.run(TWIN))


@pytest.mark.parametrize("shares", [1, 16])
def test_keys_are_shared_out_among_any_number_of_programs(monkeypatch, shares):
    monkeypatch.setattr(wrappers, "_FEWEST_SHARES", shares)
    step = DecodeStep.random("dual-chunk:chunk=24,window=5", lengths=(200,), tokens=(1,), H=2, K=1)
    assert is_close(step.run(KERNELS), step.run(TWIN))


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("has", [(0, 0, 0), (0, 0, 1), (1, 0, 0), (1, 0, 1), (1, 1, 1)])
def test_a_norm_of_a_sum(has, dtype):
    x = torch.randn(3, 37)
    delta, after, before = torch.randn(3, 37).to(dtype), torch.rand(37), torch.rand(37)
    given = [one if there else None for one, there in zip((delta, after, before), has, strict=True)]
    copy = x.clone()
    got, expected = (ops.add_norm(at, *given, 1e-6, dtype) for ops, at in ((KERNELS, x), (TWIN, copy)))
    assert is_close(got, expected) and is_close(x, copy)


@pytest.mark.parametrize(
    ("norms", "cache", "dtype", "layout", "D"),
    [
        (None, torch.float32, torch.float32, None, 16),
        (None, torch.int8, torch.float32, None, 16),
        (None, BF16, BF16, Layout(0, 16, False), 16),
        ("heads", torch.float32, torch.float32, PART, 20),
        ("heads", torch.int8, BF16, NEIGHBOURS, 20),
        ("whole", torch.float32, torch.float32, NEIGHBOURS, 20),
        ("whole", torch.float16, BF16, PART, 20),
    ],
)
def test_heads(norms, cache, dtype, layout, D):
    H, K, N = 3, 2, 3
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(N, (H + 2 * K) * D, generator=generator).to(dtype)
    phases = torch.rand(N, layout.dim // 2 if layout else 8, generator=generator) * 9
    angles = torch.stack((phases.cos(), phases.sin()), 1) * 1.2
    sizes = {None: (0, 0), "heads": (D, D), "whole": (H * D, K * D)}[norms]
    weights = [torch.rand(size, generator=generator) if size else None for size in sizes]
    queries, caches = [], []
    for ops in (KERNELS, TWIN):
        texts = [random_layer(K, D, length, cache, torch.Generator().manual_seed(length)) for length in (9, 30)]
        rows = CacheRows.of([texts[0], texts[1], texts[1]], torch.tensor([9, 30, 31]))
        queries.append(ops.heads(qkv, H, K, *weights, norms == "whole", 1e-6, angles, layout, rows))
        caches.append([torch.nan_to_num(getattr(text, name)) for text in texts for name in text.buffers])
    assert is_close(*queries)
    for got, expected in zip(*caches, strict=True):
        if got.dtype != torch.int8:
            assert is_close(got, expected)
        elif norms or layout:  # a rotated number can lie on the other side of a half
            assert (got.int() - expected.int()).abs().max() <= 1 and (got != expected).float().mean() < 0.01
        else:
            assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_a_gate(activation, dtype):
    gate_up = (3 * torch.randn(2, 1100)).to(dtype)
    expected = TWIN.gate(gate_up.double(), activation)  # float32 loses small values of 1 + tanh
    assert is_close(KERNELS.gate(gate_up, activation), expected.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize(("tokens", "rows", "columns"), [(1, 50, 80), (3, 33, 300), (16, 16, 16)])
def test_int8_weights(tokens, rows, columns, dtype):
    x = torch.randn(tokens, columns).to(dtype)
    weight, scale = torch.randint(-127, 128, (rows, columns), dtype=torch.int8), torch.rand(rows)
    assert is_close(KERNELS.int8_linear(x, weight, scale), TWIN.int8_linear(x, weight, scale))


@torch.inference_mode()
def test_a_whole_model_whose_graph_is_used_with_other_caches(monkeypatch):
    """What stands for a graph is made with the first cache, and then reads others by their addresses."""
    monkeypatch.setattr(GpuRunner, "_verify_step", lambda self: None)  # it takes half a minute in the interpreter
    hf, captured = DECODERS["llama"](), []
    engine = GpuRunner(hf, rotary_sites(hf), KERNELS, captures=lambda run: captured.append(run) or run)
    twin = GpuRunner(hf, rotary_sites(hf), TWIN)
    for runner in (engine, twin):
        runner.use(parse("rerope:5|logn"), 40)
    for text in (IDS[:, :19], IDS[:, 19:38]):
        assert difference(in_chunks(engine, [18, 1], text), in_chunks(twin, [18, 1], text)) < 1e-5
    assert len(captured) == 1
