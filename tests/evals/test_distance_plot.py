"""The distances that a scaler's plot shows, against the definitions of the position maps."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from ropewalk.evals.reports.distance_plot import broken, distance_map, distances_seen
from ropewalk.scaling import RopeSpec, parse


def literal(spec: str, i: int, j: int) -> tuple[str, float] | None:
    """The band that query i sees key j in, and the distance, written down from the definitions."""
    if spec == "rerope:6":
        return ("near", i - j) if i - j < 6 else ("far", 6)
    if spec == "sink-window:5,sinks=2":
        return ("window", i - j) if i - j < 5 else ("sinks", min(i, 6) - j) if j < 2 else None
    t, c = 7, 9
    chunks = i // t - j // t
    query = (i % t, min(i % t + t, c), c)[min(chunks, 2)]
    return ("same chunk", "chunk before", "older")[min(chunks, 2)], query - j % t


@pytest.mark.parametrize("spec", ["rerope:6", "sink-window:5,sinks=2", "dual-chunk:9,window=2"])
@pytest.mark.parametrize("length", [2, 5, 40])
def test_distances_by_brute_force(spec: str, length: int) -> None:
    bands = parse(spec).bands(RopeSpec(dim=8, base=1e4, trained_length=16))
    wanted = {i - j: literal(spec, i, j) for i in [length - 1] for j in range(length)}
    rows = distances_seen(bands, length - 1)
    got = {int(d): (row.band, seen) for row in rows for d, seen in zip(row.true, row.seen, strict=True)}
    assert got == {d: pair for d, pair in wanted.items() if pair}
    assert [row.true[0] for row in rows] == sorted(row.true[0] for row in rows)
    every = distance_map(bands, length)
    for i, j in itertools.product(range(length), repeat=2):
        pair = literal(spec, i, j) if j <= i else None
        assert np.isnan(every[i, j]) if pair is None else every[i, j] == pair[1]


def test_long_texts_are_read_at_some_places_only() -> None:
    bands = parse("rerope:512").bands(RopeSpec(dim=64, base=1e5, trained_length=8192))
    near, far = distances_seen(bands, 2**20 - 1)
    assert near.true.tolist() == near.seen.tolist() == list(range(512))
    assert (far.true[0], far.true[-1]) == (512, 2**20 - 1)
    assert 1500 < len(far.true) <= 2048
    assert (np.diff(far.true) > 0).all()
    assert (far.seen == 512).all()
    sampled = distance_map(bands, 2**20, cells=64)
    i = np.arange(64) * 2**14
    np.testing.assert_array_equal(sampled, np.where(i[:, None] >= i, np.minimum(i[:, None] - i, 512), np.nan))


def test_a_line_breaks_where_a_chunk_of_keys_ends() -> None:
    rows = distances_seen(parse("dual-chunk:9,window=2").bands(RopeSpec(dim=8, base=1e4, trained_length=16)), 24)
    true, seen = broken(rows[2])  # keys 13..0, in chunks of 7
    assert np.flatnonzero(np.isnan(true)).tolist() == np.flatnonzero(np.isnan(seen)).tolist() == [7]
    assert true[~np.isnan(true)].tolist() == list(range(11, 25))
    assert seen[:7].tolist() == seen[8:].tolist() == [3, 4, 5, 6, 7, 8, 9]
    assert not np.isnan(broken(rows[1])[0]).any()
