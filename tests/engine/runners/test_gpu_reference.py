"""The operations of a GPU step in torch, compared with literal formulas in float64."""

import re
from pathlib import Path

import pytest
import torch
from decode_steps import HALVES, MAPS, DecodeStep, difference, numbers, random_layer, rotate

import ropewalk.engine
from ropewalk.engine.attention.rotation import Layout
from ropewalk.engine.runners.gpu.ops import CacheRows
from ropewalk.engine.runners.gpu.reference import TorchOps

OPS = TorchOps()
PART, NEIGHBOURS = Layout(4, 10, False), Layout(2, 12, True)


@pytest.mark.parametrize("spec", ["none", "yarn:4", "logn", *MAPS, "rerope:20|logn", "yarn:2|self-extend:4,window=20"])
def test_attention_is_the_literal_softmax_under_every_map(spec):
    step = DecodeStep.random(spec)
    assert difference(step.run(OPS), step.expected()) < 2e-6


@pytest.mark.parametrize("spec", ["none", "rerope:20", "dual-chunk:chunk=24,window=5"])
@pytest.mark.parametrize(
    "case",
    [
        {"softcap": 5.0, "size": 4.0},
        {"layout": PART},
        {"layout": NEIGHBOURS, "D": 20},
        {"layout": None},
        {"H": 15, "K": 3},
        {"H": 2, "K": 2},
        {"H": 5, "K": 1},
        {"lengths": (1,), "tokens": (1,)},
        {"lengths": (20, 21), "tokens": (3, 2)},
        {"paths": [[0], [1], [0, 2], [0, 2, 3], [1, 4]], "lengths": (90,)},
        {"paths": [[0], [0, 1], [0, 1, 2]], "lengths": (3,)},
        {"cache": torch.int8},
        {"cache": torch.bfloat16},
    ],
    ids=str,
)
def test_attention_is_the_literal_softmax_in_every_form(spec, case):
    step = DecodeStep.random(spec, **case)
    assert difference(step.run(OPS), step.expected()) < 2e-6


def test_a_window_has_no_map():
    step = DecodeStep.random("rerope:20", window=33)
    assert difference(step.run(OPS), step.expected()) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_attention_rounds_once(dtype):
    step = DecodeStep.random("rerope:20", dtype=dtype)
    limit = {torch.float64: 2e-7, torch.bfloat16: 2e-3, torch.float16: 3e-4}[dtype]
    got = step.run(OPS)
    assert got.dtype == dtype and difference(got, step.expected()) < limit


def rms(x, weight, epsilon=1e-6):
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight.double()


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("delta", [None, torch.float32, torch.bfloat16])
def test_a_norm_of_a_sum(delta, after, before):
    x = torch.randn(3, 37)
    weights = [torch.rand(37) if has else None for has in (after, before)]
    add = None if delta is None else torch.randn(3, 37).to(delta)
    expected = x.double()
    if add is not None:
        expected = expected + (rms(add, weights[0]) if after else add.double())
    got = OPS.add_norm(x, add, *weights, 1e-6, torch.float32)
    assert difference(x, expected) < 1e-6
    assert difference(got, rms(expected, weights[1]) if before else expected) < 1e-6
    copy = got.clone()
    x.zero_()
    assert torch.equal(got, copy)
    assert OPS.add_norm(x, None, None, None, 1e-6, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("layout", [None, HALVES, PART, NEIGHBOURS])
@pytest.mark.parametrize("norms", [None, "heads", "whole"])
@pytest.mark.parametrize("cache", [torch.float32, torch.int8])
def test_heads_are_normed_rotated_and_written(layout, norms, cache):
    H, K, D = 6, 2, 16
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(4, (H + 2 * K) * D, generator=generator)
    one, other = (random_layer(K, D, length, cache, generator) for length in (9, 30))
    layers, slots = [one, other, other, one], torch.tensor([9, 30, 31, 4])
    rows = CacheRows.of(layers, slots)
    untouched = [x[:, :, :4].clone() for x in (one.keys, one.values)]
    phases = torch.rand(4, layout.dim // 2 if layout else 8, generator=generator).double() * 9
    angles = torch.stack((phases.cos(), phases.sin()), 1).mul(1.2).float()
    sizes = {None: (0, 0), "heads": (D, D), "whole": (H * D, K * D)}[norms]
    weights = [torch.rand(size, generator=generator) if size else None for size in sizes]
    got = OPS.heads(qkv, H, K, *weights, norms == "whole", 1e-6, angles, layout, rows)

    q, k, v = qkv.double().split((H * D, K * D, K * D), 1)
    q, k = (x if norms == "whole" else x.view(4, -1, D) for x in (q, k))
    if norms:
        q, k = rms(q, weights[0]), rms(k, weights[1])
    k = k.reshape(4, K, D)
    if layout:
        k = rotate(k.transpose(0, 1), layout, phases, 1.2).transpose(0, 1)
    assert difference(got, q.view(4, H, D)) < 1e-6
    for n, (layer, slot) in enumerate(zip(layers, slots.tolist(), strict=True)):
        for name, states in (("keys", k), ("values", v.view(4, K, D))):
            written = numbers(layer, name)[:, slot]
            if cache == torch.int8:
                step = states[n].abs().amax(-1, keepdim=True) / 127
                assert ((written - states[n]).abs() <= step * 0.5001).all()
            else:
                assert difference(written, states[n]) < 1e-6
    assert all(torch.equal(x[:, :, :4], old) for x, old in zip((one.keys, one.values), untouched, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_a_gate(activation, dtype):
    gate_up = (3 * torch.randn(3, 74)).to(dtype)
    gate, up = gate_up.double().chunk(2, 1)
    inner = (2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)
    active = gate / (1 + torch.exp(-gate)) if activation == "silu" else gate * (1 + torch.tanh(inner)) / 2
    got = OPS.gate(gate_up, activation)
    assert got.dtype == dtype and difference(got, active * up) < (1e-6 if dtype == torch.float32 else 3e-3)


def test_addresses_are_those_of_the_buffers():
    generator = torch.Generator().manual_seed(0)
    layer = random_layer(2, 16, 5, torch.int8, generator)
    rows = CacheRows.of([layer], torch.tensor([5]))
    expected = [
        [layer.keys.data_ptr(), layer.key_scales.data_ptr(), layer.capacity],
        [layer.values.data_ptr(), layer.value_scales.data_ptr(), layer.capacity],
    ]
    assert rows.addresses.tolist() == [expected] and rows.dtype == torch.int8


def test_only_the_kernels_import_triton():
    engine = Path(ropewalk.engine.__file__).parent
    found = {
        path.relative_to(engine).parent.as_posix()
        for path in engine.rglob("*.py")
        if re.search(r"^\s*(import|from) triton\b", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert found == {"runners/gpu/kernels"}
