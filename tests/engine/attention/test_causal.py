"""Causal attention in two parts, compared with a softmax in float64."""

import math
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    causal_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ropewalk.engine.attention import causal
from ropewalk.engine.attention.causal import _attention_forward, _mask, causal_attention
from ropewalk.engine.attention.kernel import AttentionScore, join


def brute_force(q, k, v, scale):
    """[B, H, N, D] by explicit scores, keys repeated for the groups, future keys at -inf."""
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    n, m = q.shape[2], k.shape[2]
    scores = q @ k.transpose(-1, -2) * scale
    visible = torch.arange(m) <= torch.arange(m - n, m)[:, None]
    return scores.masked_fill(~visible, -math.inf).softmax(-1) @ v


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-13)])  # fused, and plain
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 37), (16, 16), (16, 17), (5, 200), (300, 700)])
def test_equals_masked_softmax(heads, kv_heads, n, m, dtype, tolerance):
    torch.manual_seed(n * m)
    q = torch.randn(2, heads, n, 32, dtype=torch.float64)
    k, v = (torch.randn(2, kv_heads, m, 32, dtype=torch.float64) for _ in range(2))
    with torch.inference_mode():
        got = causal_attention(q.to(dtype), k.to(dtype), v.to(dtype), AttentionScore(scale=0.17))
    assert got.dtype == dtype
    assert torch.allclose(got.double(), brute_force(q, k, v, 0.17), rtol=0, atol=tolerance)


class Counted(TorchDispatchMode):
    """Counts how often each operation runs."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **kwargs or {})


def test_a_decode_step_is_one_fused_call():
    q, k, v = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 50, 16), torch.randn(1, 2, 50, 16)
    with torch.no_grad(), Counted() as counted:
        causal_attention(q, k, v, AttentionScore(scale=0.125))
    assert counted.calls["_scaled_dot_product_flash_attention_for_cpu"] == 1
    assert not counted.calls.keys() & {"lerp", "bmm", "mm"}


def test_join_is_exact_when_one_part_dominates():
    out_1, out_2 = torch.ones(1, 1, 2, 4), torch.zeros(1, 1, 2, 4)
    lse = torch.tensor([[[1000.0, -1000.0]]])
    joined, _ = join(out_1, lse, out_2, torch.zeros(1, 1, 2))
    assert torch.equal(joined[0, 0, :, 0], torch.tensor([1.0, 0.0]))


def test_no_mask_for_plain_causal_attention_and_one_otherwise():
    shape = {"batch_size": 1, "q_length": 4, "kv_length": 9, "q_offset": 5}
    assert _mask(**shape, mask_function=causal_mask_function) is None
    padding = torch.ones(1, 9, dtype=torch.bool)
    assert _mask(**shape, mask_function=causal_mask_function, attention_mask=padding) is None
    padding[0, 0] = False
    masked = _mask(**shape, mask_function=causal_mask_function, attention_mask=padding)
    assert masked is not None
    assert not masked[..., 0].any()
    assert masked[0, 0].sum().item() == 5 + 6 + 7 + 8
    assert _mask(**shape, mask_function=sliding_window_causal_mask_function(3)) is not None


def forward(q, k, v, mask=None, *, training=False, **options):
    """The function that transformers' attention layers call; heads come first in its result."""
    module = torch.nn.Identity().train(training)
    out, weights = _attention_forward(module, q, k, v, mask, **options)
    assert weights is None
    assert out.is_contiguous()
    return out.transpose(1, 2)


@pytest.mark.parametrize("scale", [None, 0.17])
def test_transformers_gets_the_same_attention(scale):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, n, 16, dtype=torch.float64) for heads, n in ((6, 5), (2, 40), (2, 40)))
    expected = brute_force(q, k, v, 0.25 if scale is None else scale)
    options = {} if scale is None else {"scaling": scale}
    with torch.no_grad():
        assert torch.allclose(forward(q, k, v, **options), expected, rtol=0, atol=1e-13)
        mask = torch.arange(40) <= torch.arange(35, 40)[:, None]
        assert torch.allclose(forward(q, k, v, mask, **options), expected, rtol=0, atol=1e-13)
        mask = mask & (torch.arange(40) > 3)
        hidden = brute_force(q, k[:, :, 4:], v[:, :, 4:], 0.25 if scale is None else scale)
        assert torch.allclose(forward(q, k, v, mask, **options), hidden, rtol=0, atol=1e-13)
    q.requires_grad_()
    with_gradients = forward(q, k, v, **options)
    assert torch.allclose(with_gradients, expected, rtol=0, atol=1e-13)
    with_gradients.sum().backward()
    assert q.grad is not None


def test_dropout_is_for_training_only():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 30, 16) for heads in (4, 2, 2))
    plain = forward(q, k, v)
    assert torch.equal(forward(q, k, v, dropout=0.5), plain)
    assert torch.equal(forward(q, k, v, training=True), plain)
    assert not torch.allclose(forward(q, k, v, dropout=0.5, training=True), plain)


def test_a_long_past_is_read_in_parts(monkeypatch):
    monkeypatch.setattr(causal, "_PAST_CHUNK", 16)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, n, 16, dtype=torch.float64) for heads, n in ((4, 3), (2, 50), (2, 50)))
    seen = []
    attend = causal.attend
    monkeypatch.setattr(causal, "attend", lambda q, k, *rest: seen.append(k.shape[2]) or attend(q, k, *rest))
    assert torch.allclose(
        causal_attention(q, k, v, AttentionScore(scale=0.17)), brute_force(q, k, v, 0.17), rtol=0, atol=1e-13
    )
    assert seen == [3, 16, 16, 15]


def test_a_mask_equals_that_of_transformers():
    shape = {"batch_size": 2, "q_length": 4, "kv_length": 9, "q_offset": 5, "mask_function": causal_mask_function}
    padding = torch.ones(2, 9, dtype=torch.bool)
    padding[1, :2] = False
    for case in (
        {**shape, "q_offset": 3},  # the last keys are ahead of every query
        {**shape, "q_length": 1, "q_offset": 3},  # transformers builds no mask here
        {**shape, "kv_offset": 1},
        {**shape, "kv_offset": 2, "q_offset": 7},
        {**shape, "attention_mask": padding},
        {**shape, "mask_function": sliding_window_causal_mask_function(3)},
        {**shape, "q_length": 9, "q_offset": torch.tensor(0), "attention_mask": padding},
        {**shape, "allow_is_causal_skip": False},  # Doge adds to the mask
    ):
        assert torch.equal(_mask(**case), sdpa_mask(**{**case, "allow_is_causal_skip": False}))
    assert _mask(2, 9, 9, mask_function=causal_mask_function) is None
    assert _mask(**{**shape, "q_offset": torch.tensor(5)}) is None
    assert _mask(**{**shape, "kv_offset": 0}, allow_is_causal_skip=True) is None


def test_transformers_finds_it_by_name():
    name = causal.register()
    assert name == causal.ATTENTION_NAME
    assert ALL_ATTENTION_FUNCTIONS[name] is _attention_forward
    assert ALL_MASK_ATTENTION_FUNCTIONS[name] is _mask


@pytest.mark.parametrize(
    ("device", "kv_heads", "dtype", "expected"),
    [
        ("cuda:0", 4, torch.float32, True),
        ("cuda:0", 2, torch.float32, False),  # torch would repeat the keys
        ("cuda:0", 4, torch.bfloat16, False),  # our fused kernel takes them
        ("cpu", 4, torch.float64, False),
    ],
)
def test_torch_computes_what_it_does_faster_on_a_gpu(device, kv_heads, dtype, expected, cuda):
    q, k = (torch.ones(1, heads, 8, 16, dtype=dtype, device=device) for heads in (4, kv_heads))
    with torch.no_grad():
        assert causal._torch_is_faster(q, k, k, AttentionScore(scale=1.0)) == expected
