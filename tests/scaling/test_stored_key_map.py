"""The key map by which a cache holds its keys."""

import pytest
import torch
from geometries import trained_on

from ropewalk.scaling import parse
from ropewalk.scaling.band import PLAIN, Band, same, stored_key_map, zero

J = torch.arange(0, 5000, 7)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("rerope:64", torch.zeros(len(J))),
        ("leaky-rerope:64,k=4", J / 4),
        ("self-extend:8,window=64", J // 8),
        ("jet-long:64", J // 20),
        ("dual-chunk:128,window=32", J % 96),
        ("string:64,window=8", J),
        ("sink-window:64", J),
        ("yarn:4", J),
        ("yarn:4|rerope:64|logn", torch.zeros(len(J))),
    ],
)
def test_it_is_that_of_the_bands_that_see_most_keys(spec, expected):
    bands = parse(spec).bands(trained_on(256), 5000)
    assert torch.equal(stored_key_map(bands)(J).double(), expected.double())


def test_bands_with_the_same_map_count_together():
    def third(i):
        return i // 3

    def two_thirds(i):
        return 2 * i // 3

    def own(j):
        return 2.0 * j

    bands = [
        Band(name="first", start=zero, stop=third, query=same, key=same),
        Band(name="second", start=third, stop=two_thirds, query=own, key=own),
        Band(name="third", start=two_thirds, stop=lambda i: i + 1, query=same, key=same),
    ]
    assert stored_key_map(bands) is same
    assert stored_key_map((PLAIN,)) is PLAIN.key
