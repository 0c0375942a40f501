"""The two-part attention against a softmax written out in float64."""

import math
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from ropewalk.engine.attention import _mask, causal_attention
from ropewalk.engine.kernel import Score, join


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
        got = causal_attention(q.to(dtype), k.to(dtype), v.to(dtype), Score(scale=0.17))
    assert got.dtype == dtype
    assert torch.allclose(got.double(), brute_force(q, k, v, 0.17), rtol=0, atol=tolerance)


class Counted(TorchDispatchMode):
    """How often each operation runs."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **kwargs or {})


def test_a_decode_step_is_one_fused_call():
    q, k, v = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 50, 16), torch.randn(1, 2, 50, 16)
    with torch.no_grad(), Counted() as counted:
        causal_attention(q, k, v, Score(scale=0.125))
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
