"""Banded attention compared with the reference, and its blocks with brute force."""

import math

import pytest
import torch
from example_count import examples
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ropewalk as rw
from ropewalk.engine.attention.banded import banded_attention
from ropewalk.engine.attention.blocks import blocks
from ropewalk.engine.attention.kernel import AttentionScore, attend, join
from ropewalk.engine.attention.plan import Plan
from ropewalk.engine.attention.reference import reference_attention
from ropewalk.engine.attention.rotation import Layout
from ropewalk.engine.attention.rows import KeyRun
from ropewalk.engine.rotary_site import RotarySite
from ropewalk.engine.rotated_keys import RotatedKeys
from ropewalk.scaling import RopeSpec, Scaler, parse
from ropewalk.scaling.band import PLAIN
from ropewalk.scaling.hf import ConfiguredRope

MAPS = [
    "rerope:{w}",
    "leaky-rerope:{w},k=2.5",
    "self-extend:3,window={w}",
    "dpe:3/2,window={w}",
    "self-logistic:{w},rate=0.3,capacity=5",
    "dual-chunk",
    "dual-chunk:{w},window=1",
    "string:{w},window=1",
    "jet-long:{w}",
    "sink-window:{w},sinks=2",
]
SPECS = [
    *MAPS,
    "none",
    "logn",
    "yarn:4",
    "dynamic-ntk:step=5",
    "dynamic-yarn|rerope:{w}",
    "ntk:4|rerope:{w}|logn",
    "yarn:2|dual-chunk|temperature:1.3",
    "jet-long:{w},step=7|logn|dynamic-ntk:3",
    "resonance|self-extend:2,window={w}|logn",
]


def usable(spec, rope):
    try:
        scaler = parse(spec)
        scaler.check(rope)
    except rw.ConfigError:
        return None
    return scaler


def work(scaler, rope, run, length=None):
    configured = ConfiguredRope(rope=rope, scaler=Scaler(), max_length=rope.trained_length)
    site = RotarySite(module=nn.Module(), layer_type=None, configured=configured)
    return [(run, Plan(site, scaler, length).segments(run))]


@st.composite
def cases(draw):
    L = draw(st.integers(8, 64))
    rope = RopeSpec(dim=draw(st.sampled_from([4, 8])), base=100.0, trained_length=L)
    spec = draw(st.sampled_from(SPECS)).format(w=draw(st.integers(1, L - 1)))
    scaler = usable(spec, rope)
    assume(scaler is not None)
    keys = draw(st.integers(1, 200))
    queries = draw(st.integers(1, keys))
    head_dim = rope.dim + draw(st.sampled_from([0, 4]))
    layout = Layout(draw(st.sampled_from([0, head_dim - rope.dim])), rope.dim, draw(st.booleans()))
    return scaler, rope, keys, queries, head_dim, layout


@examples(150)
@given(
    case=cases(),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    fixed=st.booleans(),
    softcap=st.sampled_from([None, 4.0]),
    seed=st.integers(0, 10**6),
)
def test_equals_the_reference_in_float64(case, heads, fixed, softcap, seed):
    scaler, rope, keys, queries, head_dim, layout = case
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(2, h, n, head_dim, dtype=torch.float64, generator=generator)
        for h, n in ((heads[0], queries), (heads[1], keys), (heads[1], keys))
    )
    length = keys + 3 if fixed else None
    run = KeyRun(None, 0, queries, 0, keys, 0)
    score = AttentionScore(scale=0.4, softcap=softcap)
    with torch.no_grad():
        got = banded_attention(q, k, v, score, layout, work(scaler, rope, run, length))
    expected = reference_attention(q, k, v, score, layout, scaler, rope, length)
    assert (got - expected).abs().max() < 1e-10


@examples(60)
@given(case=cases(), first=st.integers(0, 40))
def test_every_pair_lies_in_one_piece(case, first):
    scaler, rope, keys, queries, *_ = case
    for bands in (scaler.bands(rope, keys), (PLAIN,)):
        counts = torch.zeros(len(bands), keys, keys, dtype=torch.int)
        for block in blocks(bands, first, keys - queries, keys):
            for piece in block.pieces:
                square = counts[piece.band, piece.query_start : piece.query_stop, piece.key_start : piece.key_stop]
                seen = torch.ones_like(square)
                if isinstance(piece.sees, torch.Tensor):
                    seen = piece.sees.int()
                elif piece.sees != "all":
                    assert square.shape[0] == square.shape[1]
                    seen = seen.tril() if piece.sees == "lower" else seen.triu()
                square += seen
        i = torch.arange(first + keys - queries, first + keys)[:, None]
        j = torch.arange(first, first + keys)
        for band, count in zip(bands, counts, strict=True):
            assert torch.equal(count[keys - queries :], ((band.start(i) <= j) & (j < band.stop(i))).int())


@pytest.mark.parametrize("spec", ["rerope:512", "dual-chunk", "self-extend:4,window=512", "sink-window:1k", "none"])
def test_long_contexts_take_few_pieces_and_no_masks(spec):
    rope = RopeSpec(dim=8, base=1e4, trained_length=2048)
    pieces = [p for block in blocks(parse(spec).bands(rope, 8192), 0, 7168, 8192) for p in block.pieces]
    assert len(pieces) <= 20
    assert all(isinstance(piece.sees, str) for piece in pieces)


@pytest.mark.parametrize("spec", [*MAPS, "ntk:4|rerope:{w}|logn", "dynamic-ntk"])
def test_the_fused_kernel_agrees_with_the_plain_one(spec):
    rope = RopeSpec(dim=16, base=1e4, trained_length=256)
    scaler = parse(spec.format(w=90))
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, n, 16) for h, n in ((4, 700), (2, 1100), (2, 1100)))
    run, layout = KeyRun(None, 0, 700, 0, 1100, 0), Layout(0, 16, False)
    with torch.no_grad():
        fused = banded_attention(q, k, v, AttentionScore(scale=0.25), layout, work(scaler, rope, run))
        plain = banded_attention(
            *(t.double() for t in (q, k, v)), AttentionScore(scale=0.25), layout, work(scaler, rope, run)
        )
    assert (fused - plain).abs().max() < 2e-6


@pytest.mark.parametrize("spec", ["rerope:9", "dynamic-ntk:step=16", "dynamic-yarn:step=40|rerope:9|logn"])
@pytest.mark.parametrize("padding", [(0, 7), (5, 5)], ids=["one row", "both rows"])
def test_a_padded_row_is_the_row_alone(spec, padding):
    rope, scaler, layout = RopeSpec(dim=8, base=100.0, trained_length=32), parse(spec), Layout(0, 8, False)
    score, N = AttentionScore(scale=0.4), 70
    q, k, v = torch.randn(3, 2, 2, N, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    v = v[..., :6]
    runs = [KeyRun(row, start, N, start, N, 0) for row, start in enumerate(padding)]
    if padding[0] == padding[1]:
        runs = [KeyRun(None, padding[0], N, padding[0], N, 0)]
    with torch.no_grad():
        got = banded_attention(q, k, v, score, layout, [work(scaler, rope, run)[0] for run in runs])
    for row, start in enumerate(padding):
        alone = (t[row : row + 1, :, start:] for t in (q, k, v))
        expected = reference_attention(*alone, score, layout, scaler, rope)
        assert (got[row : row + 1, :, start:] - expected).abs().max() < 1e-10
        assert not got[row, :, :start].any()


def test_keys_that_were_rotated_once_are_not_rotated_again(monkeypatch):
    """Under a growing length those of its last step are kept."""
    rope, scaler = RopeSpec(dim=8, base=100.0, trained_length=32), parse("dynamic-ntk:step=16|self-extend:2,window=9")
    layout, score, rotated = Layout(0, 8, False), AttentionScore(scale=0.4), RotatedKeys()
    q, k, v = torch.randn(3, 1, 2, 64, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    counts, rotate = [], Layout.rotate
    monkeypatch.setattr(Layout, "rotate", lambda self, x, to: counts.append(x.shape[2]) or rotate(self, x, to))

    def rotations(start, stop, held):
        """Of keys and queries, in the call that brings the tokens start .. stop."""
        counts.clear()
        run = KeyRun(None, 0, stop - start, 0, stop, 0)
        at = (t[:, :, a:stop] for t, a in ((q, start), (k, 0), (v, 0)))
        with torch.no_grad():
            return banded_attention(*at, score, layout, work(scaler, rope, run), rotated=held), sum(counts)

    for start, stop in ((0, 56), (56, 60), (60, 64)):
        expected, every = rotations(start, stop, None)
        got, new = rotations(start, stop, rotated)
        assert torch.equal(got, expected)
        if start:
            assert new == 3 * (stop - start) < every, "the queries, and the new keys of two bands"


def test_large_products_do_not_overflow_float16():
    torch.manual_seed(0)
    q, k = (torch.full((1, 1, n, 128), 24.0, dtype=torch.float16) for n in (2, 3))  # 73728, and a score of 6517
    v = torch.randn(1, 1, 3, 128).half()
    with torch.enable_grad():  # the plain kernel, which is the only one on a GPU
        out, lse = attend(q, k, v, AttentionScore(scale=128**-0.5))
    assert torch.allclose(out, v.mean(2, keepdim=True), atol=2e-3)
    assert torch.allclose(lse, torch.tensor(24.0 * 24 * 128**0.5 + math.log(3)), rtol=1e-3)


class LargestTensor(TorchDispatchMode):
    """Records the number of entries of the largest new tensor."""

    def __init__(self):
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if not func.is_view:
            made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
            self.entries = max([self.entries, *(t.numel() for t in made)])
        return out


def largest_tensor(spec, dtype, tokens):
    """The largest tensor in the prefill of one layer in one call, in float64 also of its gradient."""
    rope = RopeSpec(dim=4, base=1e4, trained_length=512)
    trains = dtype == torch.float64
    q, k, v = (torch.ones(1, 1, tokens, 4, dtype=dtype, requires_grad=trains) for _ in range(3))
    run = KeyRun(None, 0, tokens, 0, tokens, 0)
    with torch.set_grad_enabled(trains), LargestTensor() as largest:
        segments = work(parse(spec), rope, run, tokens)
        out = banded_attention(q, k, v, AttentionScore(scale=0.5), Layout(0, 4, False), segments)
        if trains:
            out.sum().backward()
    return largest.entries


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # the fused kernel; the plain one, with gradients
@pytest.mark.parametrize("spec", ["rerope:256|logn", "dual-chunk", "self-extend:8,window=128", "sink-window:256"])
def test_memory_grows_with_the_context_and_not_with_its_square(spec, dtype):
    assert largest_tensor(spec, dtype, 4096) <= 2 * largest_tensor(spec, dtype, 2048)


def test_a_query_without_keys_has_no_weight():
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 2, 3, 8), torch.randn(1, 1, 5, 8), torch.randn(1, 1, 5, 8)
    nothing = torch.zeros(3, 5, dtype=torch.bool)
    everything = attend(q, k, v, AttentionScore(scale=1.0))
    for context in (torch.no_grad(), torch.enable_grad()):
        with context:
            joined, _ = join(*everything, *attend(q, k, v, AttentionScore(scale=1.0), nothing))
            assert torch.allclose(joined, everything[0], atol=1e-6)


def test_attention_sinks_of_the_model_take_weight():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 6, 8, dtype=torch.float64) for _ in range(3))
    sinks = torch.tensor([0.3, -1.0], dtype=torch.float64)
    run, rope = KeyRun(None, 0, 6, 0, 6, 0), RopeSpec(dim=8, base=1e4, trained_length=64)
    with torch.no_grad():
        got = banded_attention(q, k, v, AttentionScore(scale=0.4), None, work(Scaler(), rope, run), sinks)
    scores = (q @ k.transpose(-1, -2) * 0.4).masked_fill(~torch.ones(6, 6, dtype=torch.bool).tril(), -math.inf)
    with_sink = torch.cat((scores, sinks[None, :, None, None].expand(1, 2, 6, 1)), -1).softmax(-1)
    assert torch.allclose(got, with_sink[..., :-1] @ v)


@pytest.mark.parametrize("spec", [*MAPS, "ntk:4|rerope:{w}|logn", "dynamic-yarn:step=9"])
def test_gradients_equal_those_of_the_reference(spec):
    rope = RopeSpec(dim=8, base=100.0, trained_length=32)
    scaler, layout = parse(spec.format(w=12)), Layout(0, 8, True)
    torch.manual_seed(0)
    tensors = [torch.randn(1, h, 90, 8, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2)]
    weight = torch.randn(1, 4, 90, 8, dtype=torch.float64)
    run = KeyRun(None, 0, 90, 0, 90, 0)
    ours = banded_attention(*tensors, AttentionScore(scale=0.4), layout, work(scaler, rope, run))
    reference = reference_attention(*tensors, AttentionScore(scale=0.4), layout, scaler, rope)
    gradients = (torch.autograd.grad((out * weight).sum(), tensors) for out in (ours, reference))
    for gradient, expected in zip(*gradients, strict=True):
        assert (gradient - expected).abs().max() < 1e-10
