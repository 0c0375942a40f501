"""Attention in parts that are joined, compared with softmax in float64."""

import itertools

import numpy as np
import pytest
import torch
from kernel_data import KINDS, address, from_python, stored

from ropewalk.engine.attention.rotation import Angles, Layout
from ropewalk.engine.runners.cpu.kernels.attention import PART, join, part

pytestmark = pytest.mark.usefixtures("freed_memory_is_overwritten")

DIMS = (16, 32, 64, 80, 96, 128, 256)
LAYOUTS = [Layout(start, dim, pairs) for start, dim in ((0, 48), (8, 32), (4, 24), (0, 8)) for pairs in (False, True)]
COUNTS = (1, 2, 3, 4, 5, 7, 8, 9, 13, 31, 32, 33, 47, 65, 100, 127, 200, 253, 255, 256)


class Held:
    """Keys and values of one head, followed by numbers that must not be read."""

    def __init__(self, kind, count, D, seed=0):
        self.random = np.random.default_rng(seed)
        self.kind, self.count, self.D = kind, count, D
        self.keys, self.values = ([*stored(self.random, kind, count + 9, D)] for _ in range(2))
        for bits, scales, exact in (self.keys, self.values):
            bits[count:] = {np.float32: np.nan, np.uint16: 0x7FC0, np.int8: 127}[kind]
            if scales is not None:
                scales[count:] = np.nan
            exact[count:] = np.nan

    def queries(self, G, size=1.0):
        q = self.random.standard_normal((G, self.D)) * size / self.D**0.5
        return q.astype(np.float32)

    def part(self, q, softcap=0.0, first=0, count=None, layout=None, shift=None):
        """(output before division, peak, weight) of keys [first, first + count), rotated first if `shift` is given."""
        G, D, count = len(q), self.D, self.count - first if count is None else count
        out = np.full((G + 1, D), 7, np.float32)
        peak, weight = np.empty(G, np.float32), np.empty(G, np.float32)
        data = [address(bits[first:]) for bits, *_ in (self.keys, self.values)]
        scales = [0 if s is None else address(s[first:]) for _, s, _ in (self.keys, self.values)]
        cap = np.array([softcap], np.float32)
        rotary = (layout.start, layout.dim, layout.interleaved) if layout else (0, D, 0)
        shape = np.array([G, 1, D, 0, 0, *rotary], np.int64)
        results = address(out), address(peak), address(weight)
        about = address(q), G, address(shape), address(cap)
        part(self.kind, shift is not None).ctypes(*data, *scales, count, address(shift), *about, *results)
        assert (out[G] == 7).all()
        return out[:G], peak, weight

    def expected(self, q, softcap=0.0):
        """Softmax attention and its log-sum-exp."""
        scores = q.astype(np.float64) @ self.keys[2][: self.count].T
        if softcap:
            scores = softcap * np.tanh(scores / softcap)
        peak = scores.max(1, keepdims=True)
        weights = np.exp(scores - peak)
        whole = weights.sum(1, keepdims=True)
        return weights / whole @ self.values[2][: self.count], (peak + np.log(whole))[:, 0]


def check(held, q, softcap=0.0, tolerance=2e-6):
    out, peak, weight = held.part(q, softcap)
    expected, log_sum = held.expected(q, softcap)
    size = np.abs(held.values[2][: held.count]).max()
    assert np.abs(out / weight[:, None] - expected).max() < tolerance * size
    assert np.abs(peak + np.log(weight.astype(np.float64)) - log_sum).max() < tolerance * max(1, np.abs(log_sum).max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("G", range(1, 9))
def test_a_part_is_softmax_for_groups_of_every_size(kind, G):
    for seed, count in enumerate(COUNTS):
        held = Held(kind, count, DIMS[(seed + G) % 7], seed)
        check(held, held.queries(G, 3))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("D", DIMS)
def test_a_part_is_softmax_for_heads_of_every_size(kind, D):
    for G in (1, 2, 3, 4):
        held = Held(kind, 75, D, G)
        check(held, held.queries(G, 3))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("softcap", [0.5, 2.0, 50.0])
def test_scores_are_capped(kind, softcap):
    for count in (1, 6, 77):
        held = Held(kind, count, 32, count)
        q = held.queries(5, 8)
        check(held, q, softcap, tolerance=2e-6 + 3e-7 * softcap)
        wide = held.queries(2, 1e4)  # both ends of tanh
        check(held, wide, softcap, tolerance=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_keys_are_rotated_before_they_are_scored(kind, layout):
    for G, count in ((1, 1), (2, 33), (3, 64), (5, 250)):
        held = Held(kind, count, 48, count)
        angle = held.random.uniform(-9, 9, (count, layout.dim // 2))
        shift = np.stack([np.cos(angle), np.sin(angle)], 1).astype(np.float32)
        q = held.queries(G, 3)
        out, peak, weight = held.part(q, layout=layout, shift=shift)
        cos, sin = (torch.from_numpy(part_of).double() for part_of in (shift[:, 0], shift[:, 1]))
        keys = torch.from_numpy(held.keys[2][:count])
        held.keys[2][:count] = layout.rotate(keys, Angles(cos, sin)).numpy()
        expected, log_sum = held.expected(q)
        size = np.abs(held.values[2][:count]).max()
        assert np.abs(out / weight[:, None] - expected).max() < 2e-6 * size
        assert np.abs(peak + np.log(weight) - log_sum).max() < 2e-6 * max(1, np.abs(log_sum).max())


def test_scores_far_below_the_largest_have_no_weight():
    held = Held(np.float32, 40, 16)
    q = held.queries(3, 1000)
    check(held, q, tolerance=3e-4)  # scores of 2000 are known to 1e-4
    out, _, weight = held.part(q)
    assert np.isfinite(out).all() and (weight >= 1).all()


@pytest.mark.parametrize("cuts", [[], [1], [100], [7, 256, 300], [256, 512], [255, 500, 501, 700]])
@pytest.mark.parametrize(("kind", "G"), [(np.float32, 1), (np.float32, 3), (np.int8, 2), (np.uint16, 5)])
def test_parts_are_joined_to_the_whole(kind, G, cuts):
    count = (cuts[-1] if cuts else 0) + 91
    edges = [0, *cuts, count]
    assert max(np.diff(edges)) <= PART
    held = Held(kind, count, 48, G)
    q = held.queries(G, 4)
    parts = [held.part(q, first=a, count=b - a) for a, b in itertools.pairwise(edges)]
    junk = [np.full_like(x, np.nan) for x in parts[0]]  # parts of other tokens, before and after
    outs, peaks, weights = (np.stack(x) for x in zip(junk, *parts, junk, strict=True))
    result = np.full(G * 48 + 1, 7, np.float32)
    for head in range(G):
        from_python(join)(outs, peaks, weights, 1, 1 + len(parts), head, 48, result)
    expected, _ = held.expected(q)
    assert np.abs(result[:-1].reshape(G, 48) - expected).max() < 2e-6 * np.abs(held.values[2][:count]).max()
    assert result[-1] == 7


def test_a_part_without_weight_changes_nothing():
    random = np.random.default_rng(0)
    outs = random.standard_normal((2, 3, 16)).astype(np.float32)
    weights = random.uniform(1, 9, (2, 3)).astype(np.float32)
    for order in ([0, -2000.0], [-2000.0, 0]):
        peaks = np.array(order, np.float32)[:, None].repeat(3, 1)
        result = np.empty(48, np.float32)
        for head in range(3):
            from_python(join)(outs, peaks, weights, 0, 2, head, 16, result)
        heavy = order.index(0)
        assert np.allclose(result.reshape(3, 16), outs[heavy] / weights[heavy][:, None], rtol=1e-6, atol=0)
