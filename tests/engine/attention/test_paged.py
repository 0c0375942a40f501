"""Attention over pages compared with the literal form, text by text, for any division of the texts into calls."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from ropewalk.engine.attention import paged as module
from ropewalk.engine.attention import paged_products
from ropewalk.engine.attention.kernel import AttentionScore
from ropewalk.engine.attention.paged import PagedBatch
from ropewalk.engine.attention.paged_products import ChunkProducts
from ropewalk.engine.attention.paged_rope import PagedRope
from ropewalk.engine.attention.reference import reference_attention
from ropewalk.engine.attention.rotation import Angles, Layout
from ropewalk.engine.runners.cpu import kernels
from ropewalk.engine.runners.cpu.kernels import UNAVAILABLE
from ropewalk.errors import RopewalkWarning
from ropewalk.scaling import RopeSpec, Scaler, parse
from ropewalk.scaling.configured_rope import ConfiguredRope
from ropewalk.scaling.named_scaler import NamedScaler

L, PAGE, HEADS, GROUPS, DIM = 32, 16, 6, 2, 32
SPECS = [
    "none",
    "logn",
    "temperature:1.3",
    "yarn:4",
    "rerope:8|logn",
    "leaky-rerope:9,k=2.5",
    "self-extend:3,window=10|logn",
    "dual-chunk|logn",
    "string:16,window=4",
    "dpe:4/2,window=8",
    "jet-long:9",
    "sink-window:20,sinks=2",
    "dynamic-ntk:4|logn",
    "yarn:4|rerope:20",
]
TEXTS = [5, 61, 127, 70, 1]
CALLS = [[5, 40, 100, 1, 0], [0, 20, 1, 1, 0], [0, 1, 26, 67, 1], [0, 0, 0, 1, 0]]
"""Tokens of every text in each call."""


def rope_of(spec: str, layout: Layout, window: int | None = None, local_base: float | None = None) -> PagedRope:
    configured, local = (
        base
        and ConfiguredRope(rope=RopeSpec(dim=layout.dim, base=base, trained_length=L), scaler=Scaler(), max_length=L)
        for base in (1e3, local_base)
    )
    scaler = parse(spec)
    length = 4 * L if scaler.depends_on_length else None
    return PagedRope(NamedScaler(configured=configured, scaler=scaler, length=length, local=local), layout, window)


def paged(rope, q, k, v, score, dtype):
    """The texts through pages in shuffled places, call by call."""
    counts = [-(-length // PAGE) for length in TEXTS]
    order = torch.randperm(sum(counts) + 3, generator=torch.Generator().manual_seed(1))
    blocks = torch.zeros(len(TEXTS), max(counts), dtype=torch.int32)
    for row, count in enumerate(counts):
        begin = sum(counts[:row])
        blocks[row, :count] = order[begin : begin + count]
    pages = torch.full((len(order), GROUPS, 2, PAGE, DIM), 7.0, dtype=dtype)
    read, outs = [0] * len(TEXTS), [[] for _ in TEXTS]
    for call in CALLS:
        ends = [done + new for done, new in zip(read, call, strict=True)]
        starts = torch.tensor([0, *call]).cumsum(0).tolist()
        batch = PagedBatch(rope, starts, ends, blocks, PAGE)
        part = [torch.cat([x[i][a:b] for i, (a, b) in enumerate(zip(read, ends, strict=True))]) for x in (q, k, v)]
        out = torch.zeros_like(part[0])
        batch.write(part[1], part[2], pages)
        batch.attend(part[0], pages, score, out)
        for row, (a, b) in enumerate(itertools.pairwise(starts)):
            outs[row].append(out[a:b])
        read = ends
    assert read == TEXTS
    return [torch.cat(rows) for rows in outs]


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, narrow: bool) -> Iterator[None]:
    """The attention of longer ends of a text by bfloat16 products or without, on every CPU; the test fails if it is
    computed in another way."""
    made = []

    def counted(*args: Any) -> ChunkProducts:
        made.append(args)
        return ChunkProducts(*args)

    monkeypatch.setattr(kernels, "HAS_BFLOAT16_PRODUCTS", narrow)
    monkeypatch.setattr(paged_products, "ChunkProducts", counted)
    yield
    assert bool(made) == (narrow and dtype == torch.bfloat16)


DTYPES = pytest.mark.parametrize(
    ("dtype", "narrow", "most"),
    [
        (torch.float64, False, 1e-10),
        (torch.float32, False, 3e-5),
        (torch.float32, True, 3e-5),
        (torch.bfloat16, False, 0.06),
        pytest.param(torch.bfloat16, True, 0.06, marks=pytest.mark.skipif(bool(UNAVAILABLE), reason=str(UNAVAILABLE))),
    ],
)


@DTYPES
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.usefixtures("products")
def test_texts_in_pages_get_the_attention_of_each_text_alone(spec: str, dtype: torch.dtype, most: float) -> None:
    generator = torch.Generator().manual_seed(3)
    part, neighbours = spec in ("rerope:8|logn", "yarn:4"), spec == "string:16,window=4"
    layout = Layout(0, 16 if part else DIM, neighbours)
    rope, score = rope_of(spec, layout), AttentionScore(scale=0.3)
    q, k, v = (
        [torch.randn(length, heads, DIM, generator=generator).to(dtype) for length in TEXTS]
        for heads in (HEADS, GROUPS, GROUPS)
    )
    with torch.inference_mode():
        outs = paged(rope, q, k, v, score, dtype)
    for one, *qkv in zip(outs, q, k, v, strict=True):
        q_, k_, v_ = (x.double().transpose(0, 1)[None] for x in qkv)
        named = rope.named
        want = reference_attention(
            q_, k_, v_, score, layout, named.scaler, named.configured.rope, length=named.length or L
        )
        assert (one.double() - want[0].transpose(0, 1)).abs().max() < most


@pytest.mark.parametrize("window", [1, 7, 16, 40, 500])
@pytest.mark.parametrize(
    ("spec", "local_base", "own"),
    [("yarn:4|rerope:8|logn", None, "yarn:4"), ("dual-chunk|logn", None, "none"), ("yarn:4|rerope:8", 50.0, "none")],
)
@DTYPES
@pytest.mark.usefixtures("products")
def test_layers_with_a_window_keep_it_without_the_map_and_the_temperature(
    spec: str, local_base: float | None, own: str, window: int, dtype: torch.dtype, most: float
) -> None:
    layout, score = Layout(0, DIM, False), AttentionScore(scale=0.3)
    rope = rope_of(spec, layout, window, local_base)
    generator = torch.Generator().manual_seed(4)
    q, k, v = (
        [torch.randn(length, heads, DIM, generator=generator).to(dtype) for length in TEXTS]
        for heads in (HEADS, GROUPS, GROUPS)
    )
    with torch.inference_mode():
        outs = paged(rope, q, k, v, score, dtype)
    frequencies = parse(own).frequencies(RopeSpec(dim=DIM, base=local_base or 1e3, trained_length=L), None)
    for one, *qkv in zip(outs, q, k, v, strict=True):
        count = len(one)
        phases = torch.arange(count)[:, None] * frequencies.inv_freq
        turn = Angles(phases.cos() * frequencies.attention_factor, phases.sin() * frequencies.attention_factor)
        q_, k_, v_ = (x.double().transpose(0, 1) for x in qkv)
        k_, v_ = (x.repeat_interleave(HEADS // GROUPS, 0) for x in (k_, v_))
        scores = layout.rotate(q_, turn) @ layout.rotate(k_, turn).transpose(1, 2) * score.scale
        distance = torch.arange(count)[:, None] - torch.arange(count)
        hidden = (distance < 0) | (distance >= window)
        want = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v_
        assert (one.double() - want.transpose(0, 1)).abs().max() < most


def test_keys_that_the_kernel_does_not_read_are_told_of() -> None:
    layout = Layout(0, DIM, False)
    rope, score = rope_of("rerope:8|logn", layout), AttentionScore(scale=0.3)
    texts = [[torch.zeros(length, heads, DIM).double() for length in TEXTS] for heads in (HEADS, GROUPS, GROUPS)]
    module._warn_of_copies.cache_clear()
    with (
        torch.inference_mode(),
        pytest.warns(RopewalkWarning, match=r"slow: the kernel .* torch\.float64 keys of 32 numbers"),
    ):
        paged(rope, *texts, score, torch.float64)


@pytest.mark.parametrize("tokens", [1, 40])
def test_only_the_pages_of_the_texts_are_copied(tokens: int) -> None:
    rope = rope_of("rerope:8|logn", Layout(0, DIM, False))
    pages = torch.zeros(2000, GROUPS, 2, PAGE, DIM)
    batch = PagedBatch(rope, [0, tokens], [60], torch.tensor([[7, 1900, 3, 5]]), PAGE)
    q, k = torch.randn(tokens, HEADS, DIM), torch.randn(tokens, GROUPS, DIM)
    with torch.inference_mode(), torch.autograd.profiler.profile(profile_memory=True) as profile:
        batch.write(k, k, pages)
        batch.attend(q, pages, AttentionScore(scale=0.3), torch.zeros_like(q))
    assert max(event.cpu_memory_usage for event in profile.key_averages()) < pages.nbytes / 20
