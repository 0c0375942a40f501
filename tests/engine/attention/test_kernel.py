"""One rectangle of attention: the precision of its scores, and what torch's flash kernel of a GPU computes of it."""

import math

import pytest
import torch
from pretend_cuda import CudaTensor, pretend_cuda

from ropewalk.engine.attention import causal, kernel
from ropewalk.engine.attention.causal import causal_attention
from ropewalk.engine.attention.kernel import AttentionScore, attend

SCALE = 0.17


def drawn(n, m, dim=16, heads=4, kv_heads=2, dtype=torch.bfloat16, spread=1.0):
    torch.manual_seed(n * m + dim)
    q = torch.randn(1, heads, n, dim) * spread
    return [t.to(dtype) for t in (q, torch.randn(1, kv_heads, m, dim), torch.randn(1, kv_heads, m, dim))]


def reference(q, k, v, seen, softcap=None):
    q, k, v = (t.double() for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) * SCALE
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, -math.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def visible(sees, n, m):
    if isinstance(sees, torch.Tensor):
        return sees
    square = torch.ones(n, m, dtype=torch.bool)
    return {"all": square, "lower": square.tril(), "upper": square.triu()}[sees]


def test_scores_are_float32_without_the_fused_kernel_too():
    """With scores up to 40, whose rounding to bfloat16 would be up to 0.125, the error is that of the fused kernel."""
    q, k, v = drawn(64, 300, dim=64, spread=7)
    expected, _ = reference(q, k, v, visible("all", 64, 300))
    assert (q.double() @ k.double().repeat_interleave(2, 1).transpose(-1, -2) * SCALE).max() > 40
    with torch.no_grad():
        fused = attend(q, k, v, AttentionScore(scale=SCALE))[0]
    plain = attend(q, k, v, AttentionScore(scale=SCALE))[0]  # with gradients
    errors = [float((out.double() - expected).square().mean().sqrt()) for out in (fused, plain)]
    assert errors[1] < 1.3 * errors[0]


@pytest.fixture
def cuda():
    kernel._has_flash.cache_clear()
    with pretend_cuda() as device, torch.no_grad():
        yield device
    kernel._has_flash.cache_clear()


NARROW = torch.ones(8, 12, dtype=torch.bool).tril(4).triu(2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize(
    ("sees", "n", "m", "flash"), [("all", 5, 70, 1), ("lower", 9, 9, 1), ("upper", 9, 9, 1), (NARROW, 8, 12, 0)]
)
def test_flash_on_a_gpu(sees, n, m, flash, heads, kv_heads, dtype, cuda):
    tensors = drawn(n, m, heads=heads, kv_heads=kv_heads, dtype=dtype)
    out, lse = attend(*map(CudaTensor, tensors), AttentionScore(scale=SCALE), sees)
    expected = reference(*tensors, visible(sees, n, m))
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(out.values.double(), expected[0], atol=0.03, rtol=0)
    torch.testing.assert_close(lse.values.double(), expected[1], atol=1e-4, rtol=0)
    assert cuda.kernels["flash attention"] == flash
    assert bool(cuda.kernels["bmm"]) != bool(flash)


@pytest.mark.parametrize(
    "case", ["float32", "float64", "dim 12", "dim 264", "softcap", "gradients", "an old GPU", "torch without it"]
)
def test_what_flash_does_not_take(case, cuda, monkeypatch):
    dtype = {"float32": torch.float32, "float64": torch.float64}.get(case, torch.float16)
    dim = int(case.removeprefix("dim ")) if "dim" in case else 16
    tensors = drawn(7, 40, dim=dim, dtype=dtype)
    softcap = 5.0 if case == "softcap" else None
    if case == "an old GPU":
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    if case == "torch without it":
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    with torch.set_grad_enabled(case == "gradients"):
        out, _ = attend(*map(CudaTensor, tensors), AttentionScore(scale=SCALE, softcap=softcap))
    expected, _ = reference(*tensors, visible("all", 7, 40), softcap)
    torch.testing.assert_close(out.values.double(), expected, atol=0.01, rtol=0)
    assert not cuda.kernels["flash attention"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("n", "m"), [(1, 37), (16, 16), (20, 90)])
def test_causal_attention_on_a_gpu(n, m, dtype, cuda, monkeypatch):
    monkeypatch.setattr(causal, "_PLAIN_QUERIES", 8)
    tensors = drawn(n, m, dtype=dtype)
    out = causal_attention(*map(CudaTensor, tensors), AttentionScore(scale=SCALE))
    seen = torch.arange(m) <= torch.arange(m - n, m)[:, None]
    tolerance = 0.03 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(out.values.double(), reference(*tensors, seen)[0], atol=tolerance, rtol=0)
    parts = 1 + (m > n > 1)
    assert cuda.kernels["flash attention"] == (parts if dtype == torch.bfloat16 else 0)
    assert not cuda.uploads and not cuda.syncs


def test_torch_computes_float32_without_groups(cuda, monkeypatch):
    """Its kernel holds no scores."""
    tensors = drawn(5, 20, kv_heads=4, dtype=torch.float32)
    layer = torch.nn.Identity()
    lower_right = torch.ones(5, 20, dtype=torch.bool, device="cuda:0").tril(15)
    monkeypatch.setattr(causal, "causal_lower_right", lambda n, m: lower_right)  # torch makes no such tensor in a mode
    out, _ = causal._attention_forward(layer, *map(CudaTensor, tensors), None, SCALE)
    seen = torch.arange(20) <= torch.arange(15, 20)[:, None]
    torch.testing.assert_close(out.values.double().transpose(1, 2), reference(*tensors, seen)[0], atol=1e-5, rtol=0)
    assert cuda.kernels["attention with a mask"] == 1


@pytest.mark.parametrize("n", [3, 17, 40])
def test_plain_queries_are_taken_in_parts(n, monkeypatch):
    monkeypatch.setattr(causal, "_PLAIN_QUERIES", 8)
    tensors = drawn(n, 50, dtype=torch.float64)
    seen = torch.arange(50) <= torch.arange(50 - n, 50)[:, None]
    most = []
    monkeypatch.setattr(causal, "attend", lambda q, *rest: most.append(q.shape[2]) or attend(q, *rest))
    out = causal_attention(*tensors, AttentionScore(scale=SCALE))
    torch.testing.assert_close(out, reference(*tensors, seen)[0], atol=1e-13, rtol=0)
    assert max(most) <= 8


@pytest.mark.parametrize("n", [1, 4])
def test_plain_keys_are_taken_in_parts(n, monkeypatch):
    """Few queries take more keys at a time, so that a decode step has as many operations at any length."""
    monkeypatch.setattr(kernel, "_PLAIN_KEYS", 4)
    monkeypatch.setattr(kernel, "_PLAIN_SCORES", 32)
    tensors = drawn(n, 50, dtype=torch.float64)
    most = []
    plain = kernel._attend_plain
    monkeypatch.setattr(kernel, "_attend_plain", lambda q, k, *rest: most.append(k.shape[2]) or plain(q, k, *rest))
    out, _ = attend(*tensors, AttentionScore(scale=SCALE))
    torch.testing.assert_close(out, reference(*tensors, visible("all", n, 50))[0], atol=1e-13, rtol=0)
    assert max(most) == 32 // n
