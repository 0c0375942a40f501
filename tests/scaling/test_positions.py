"""Position maps: the bands against a matrix of distances written down literally, pair by pair."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from geometries import LLAMA3, trained_on
from hypothesis import given
from hypothesis import strategies as st
from position_maps import MAPS, at, largest, plain, seen

from ropewalk.scaling import (
    DPE,
    METHODS,
    DualChunk,
    JetLong,
    LeakyReRoPE,
    ReRoPE,
    RopeSpec,
    Scaler,
    SelfExtend,
    SelfLogistic,
    SinkWindow,
    String,
    YaRN,
)
from ropewalk.scaling.spec import parse

L = 8192


def test_every_map_is_here() -> None:
    assert set(MAPS) == {name for name, method in METHODS.items() if method.facet == "positions"}


@pytest.mark.parametrize("name", MAPS)
@given(data=st.data())
def test_bands_give_the_distances_of_the_table(name: str, data: st.DataObject) -> None:
    case = data.draw(MAPS[name])
    case.scaler.check(case.rope)
    got, count = seen(case.scaler.bands(case.rope, case.length), case.n, case.pair)
    table = [[case.distance(i, j) if j <= i else None for j in range(case.n)] for i in range(case.n)]
    wanted = np.array(table, dtype=float)  # None, a key that is not seen, is NaN
    np.testing.assert_array_equal(count, ~np.isnan(wanted))
    np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", MAPS)
@given(data=st.data())
def test_borders_and_positions_are_as_a_band_promises(name: str, data: st.DataObject) -> None:
    case = data.draw(MAPS[name])
    i = torch.arange(case.n)
    for band in case.scaler.bands(case.rope, case.length):
        start, stop = band.start(i), band.stop(i)
        assert start.dtype == stop.dtype == torch.int64
        assert band.query(i).dtype == band.key(i).dtype == torch.float64
        assert (start >= 0).all()
        assert (start <= stop).all()
        assert (stop <= i + 1).all()
        chunk_ends = torch.zeros(case.n - 1, dtype=torch.bool) if case.chunk is None else i[1:] % case.chunk == 0
        for border in (start, stop):
            step = border.diff()
            assert (step >= 0).all()
            assert ((step <= 1) | chunk_ends).all()


@pytest.mark.parametrize("name", MAPS)
@given(data=st.data())
def test_a_position_is_mapped_by_itself(name: str, data: st.DataObject) -> None:
    """Alone, out of order or in a matrix: a chunk of a prefill gives the same as the whole prefill."""
    case = data.draw(MAPS[name])
    i = torch.arange(case.n)
    some = torch.tensor(data.draw(st.lists(st.integers(0, case.n - 1), min_size=1, max_size=6)))
    for band in case.scaler.bands(case.rope, case.length):
        for function in (band.start, band.stop, band.query, band.key):
            assert torch.equal(function(some), function(i)[some])
            assert torch.equal(function(some[:, None]), function(i)[some][:, None])


@pytest.mark.parametrize("name", ["leaky-rerope", "self-extend", "self-logistic", "string"])
@given(data=st.data())
def test_a_finite_reach_is_the_last_context_within_the_trained_distances(name: str, data: st.DataObject) -> None:
    case = data.draw(MAPS[name])
    reach = case.scaler.reach(case.rope)
    assert reach == int(reach) >= case.trained
    assert largest(case.scaler, case.trained, int(reach)) < case.trained
    assert largest(case.scaler, case.trained, int(reach) + 1) >= case.trained


@given(data=st.data())
def test_dpe_reaches_the_trained_distances_of_the_pairs_without_a_full_rotation(data: st.DataObject) -> None:
    case = data.draw(MAPS["dpe"])
    wavelengths = [2 * math.pi * 1e4 ** (2 * i / 8) for i in range(4)]
    slow = [pair for pair in range(4) if wavelengths[pair] > case.trained]
    reach = case.scaler.reach(case.rope)
    assert reach == int(reach)

    def far(n: int) -> float:
        return max(largest(case.scaler, case.trained, n, pair) for pair in slow)

    assert far(int(reach)) < case.trained <= far(int(reach) + 1)


def test_dpe_where_all_pairs_complete_a_rotation_reaches_as_far_as_every_pair() -> None:
    rope = RopeSpec(dim=4, base=100, trained_length=1000)
    assert DPE(groups=(2, 8), window=100).reach(rope) == 900 * 2 + 100


def test_dpe_of_llama_3() -> None:
    """Its authors read 128k tokens with it. The pairs from 35 on complete no rotation over 8k."""
    scaler = DPE(groups=(4, 4, 2, 16, 32, 32, 16, 128), window=1024)
    scaler.check(LLAMA3)
    assert scaler.reach(LLAMA3) == (8192 - 1024) * 16 + 1024
    far = scaler.bands(LLAMA3)[1]
    distance = far.query(torch.tensor(100_000)) - far.key(torch.tensor(0))
    assert distance.shape == (64,)
    assert distance[::8].tolist() == [100_000 // G + 1024 - 1024 // G for G in scaler.groups]


def test_dpe_with_one_size_is_self_extend() -> None:
    i = torch.arange(200)
    for mine, theirs in zip(
        DPE(groups=(5, 5), window=30).bands(trained_on(64)),
        SelfExtend(group=5, window=30).bands(trained_on(64)),
        strict=True,
    ):
        for pair in range(4):
            assert torch.equal(at(mine.query, i, pair), theirs.query(i))
            assert torch.equal(at(mine.key, i, pair), theirs.key(i))


def test_the_groups_of_self_logistic() -> None:
    """r = 0.02 and C = 33: group k is the first with y tokens from k = ln(32 y / (33 - y)) / r on."""
    far = SelfLogistic(window=1).bands(trained_on(64))[1]
    groups = far.key(torch.arange(20_000)).long()
    sizes = torch.bincount(groups)[:-1]  # the last one may be cut
    firsts = [int((sizes >= y).nonzero()[0]) for y in range(2, 33)]
    assert firsts == [math.ceil(math.log(32 * y / (33 - y)) / 0.02) for y in range(2, 33)]
    assert sizes[0] == 1 and sizes.diff().min() == 0 and sizes.max() == 32


@pytest.mark.parametrize("name", ["rerope", "dual-chunk", "jet-long", "sink-window"])
@given(data=st.data())
def test_an_infinite_reach_never_leaves_the_trained_distances(name: str, data: st.DataObject) -> None:
    case = data.draw(MAPS[name])
    assert case.scaler.reach(case.rope) == float("inf")
    for n in (case.trained, 2 * case.trained + 1, 5 * case.trained + 3):
        assert largest(case.scaler, case.trained, n) < case.trained


def test_infinite_reaches_at_a_million_tokens() -> None:
    """Only the last query. With a float32 anywhere, distances of single tokens would be lost here."""
    last = torch.tensor([2**20 + 2])
    keys = torch.arange(2**20 + 3)
    for scaler in (ReRoPE(window=512), DualChunk(), JetLong(), SinkWindow(window=1024)):
        far, near = 0.0, 0
        for band in scaler.bands(trained_on(L), len(keys)):
            inside = keys[int(band.start(last)) : int(band.stop(last))]
            distances = band.query(last) - band.key(inside)
            far = max(far, float(distances.max()))
            if inside[-1] == last:
                assert distances[-3:].tolist() == [2, 1, 0]
                near += 1
        assert far < L and near == 1


@pytest.mark.parametrize(
    ("scaler", "reach"),
    [
        (LeakyReRoPE(window=512, k=8), 512 + 7680 * 8),
        (SelfExtend(group=4, window=512), (L - 512) * 4 + 512),  # the paper's form, where G divides W
        (SelfExtend(group=5, window=512), (L - 512 + 102) * 5),
        (String(shift=2730, window=128), L + 2730 - 128),
    ],
)
def test_reaches_by_hand(scaler: Scaler, reach: int) -> None:
    assert scaler.reach(trained_on(L)) == reach


@given(trained=st.integers(2, 40), length=st.integers(0, 80), step=st.none() | st.integers(1, 30), data=st.data())
def test_jet_long_grows_within_the_trained_distances(
    trained: int, length: int, step: int | None, data: st.DataObject
) -> None:
    """A query uses the length of its own step, and that is never too short for it."""
    scaler = JetLong(near=data.draw(st.integers(1, trained - 1)), step=step)
    n = trained + length
    for i in range(n):
        row = seen(scaler.bands(trained_on(trained), scaler.growing_length(i, trained_on(trained))), n)[0][i]
        assert np.nanmax(row) < trained
        if i < trained:
            np.testing.assert_array_equal(row, plain(n)[i])


@given(n=st.integers(1, 80), window=st.integers(1, 30), more=st.integers(0, 5))
def test_scalers_that_do_not_change_the_distances(n: int, window: int, more: int) -> None:
    wide = n + more
    untouched = [
        Scaler(),
        YaRN(factor=4),
        SelfExtend(group=1, window=window),
        DPE(groups=(1, 1), window=window),
        DPE(groups=(3, 2), window=wide),
        SelfLogistic(window=window, capacity=2),
        SelfLogistic(window=wide),
        LeakyReRoPE(window=window, k=1),
        String(shift=window, window=window),
        ReRoPE(window=wide),
        LeakyReRoPE(window=wide, k=3),
        SelfExtend(group=3, window=wide),
        JetLong(near=wide),
        String(shift=wide, window=1),
        SinkWindow(window=wide),
        SinkWindow(window=window, sinks=max(1, wide - window)),
        DualChunk(chunk=window + wide, window=window),
    ]
    for scaler in untouched:
        got, count = seen(scaler.bands(trained_on(500), 500), n)
        np.testing.assert_array_equal(got, plain(n), err_msg=str(scaler))
        assert (count == ~np.isnan(got)).all()


@given(trained=st.integers(2, 60), near=st.integers(1, 30), data=st.data())
def test_jet_long_starts_beyond_the_trained_length(trained: int, near: int, data: st.DataObject) -> None:
    length = data.draw(st.none() | st.integers(1, trained))
    n = length or trained
    np.testing.assert_array_equal(seen(JetLong(near=near).bands(trained_on(trained), length), n)[0], plain(n))
    far = seen(JetLong(near=1).bands(trained_on(trained), trained + 1), trained + 1)[0]
    assert far[-1, 0] == trained // 2  # G = 2


@given(n=st.integers(1, 80), window=st.integers(1, 12), more=st.integers(0, 12))
def test_dual_chunk_keeps_the_nearest_keys(n: int, window: int, more: int) -> None:
    """If a chunk has the window (t >= w), distances up to the window do not change."""
    got = seen(DualChunk(chunk=2 * window + more, window=window).bands(trained_on(500)), n)[0]
    near = plain(n) <= window
    np.testing.assert_array_equal(got[near], plain(n)[near])


def test_a_worked_example_of_each() -> None:
    """Query 9, keys 0..9, by hand."""
    nan = np.nan
    rows = {
        ReRoPE(window=4): [4, 4, 4, 4, 4, 4, 3, 2, 1, 0],
        LeakyReRoPE(window=4, k=2): [6.5, 6, 5.5, 5, 4.5, 4, 3, 2, 1, 0],
        SelfExtend(group=3, window=4): [6, 6, 6, 5, 5, 5, 3, 2, 1, 0],
        DPE(groups=(3, 2), window=4): [6, 6, 6, 5, 5, 5, 3, 2, 1, 0],
        SelfLogistic(window=4, rate=1, capacity=4): [7, 6, 5, 5, 4, 4, 3, 2, 1, 0],
        DualChunk(chunk=6, window=2): [6, 5, 4, 3, 5, 4, 3, 2, 1, 0],
        String(shift=5, window=2): [6, 5, 4, 3, 2, 4, 3, 2, 1, 0],
        JetLong(near=3): [4, 4, 3, 3, 2, 2, 1, 2, 1, 0],
        SinkWindow(window=3, sinks=2): [4, 3, nan, nan, nan, nan, nan, 2, 1, 0],
    }
    for scaler, row in rows.items():
        np.testing.assert_array_equal(seen(scaler.bands(trained_on(8), 10), 10)[0][9], row, err_msg=str(scaler))


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        ("none", "all"),
        ("rerope:64", "near, far"),
        ("leaky-rerope:window=64,k=4", "near, far"),
        ("self-extend:4,window=64", "near, far"),
        ("dpe:4/2,window=64", "near, far"),
        ("self-logistic:64", "near, far"),
        ("dual-chunk", "same chunk, chunk before, older"),
        ("string", "near, far"),
        ("jet-long:64", "near, far"),
        ("sink-window:64", "window, sinks"),
    ],
)
def test_bands_have_names(spec, names) -> None:
    assert ", ".join(band.name for band in parse(spec).bands(trained_on(2048))) == names
