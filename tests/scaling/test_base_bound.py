"""The base bound: known results, brute force over bases and distances, and the statements of the docstrings."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from closed_forms import brute, brute_first

from ropewalk.errors import ConfigError
from ropewalk.scaling import BaseBound, RopeSpec
from ropewalk.scaling.base_bound import (
    RESOLUTION,
    base_report,
    ceiling_base,
    first_failure,
    largest_infeasible_base,
    preference,
    smallest_feasible_base,
)

# N, smallest feasible, largest infeasible for d = 128, rounded to nine digits: hence the tolerance below. They were
# computed by this module; `check_edges`, brute force at small N and KEXUE's two digits confirm them.
SHORT = [
    (1024, 4293.43757, 6018.28086),
    (2048, 11587.2443, 22764.3038),
    (4096, 26952.3392, 58789.5041),
    (8192, 83763.8410, 394327.905),
]
LONG = [
    (16384, 231643.647, 1321077.96),
    (32768, 629978.263, 3325751.03),
    (65536, 2090179.67, 14949413.9),
    (131072, 4869104.37, 42273617.5),
    (262144, 23662397.0, 269364729.0),
    (524288, 58496173.8, 1298576133.0),
    (1048576, 65374955.2, 3914047851.0),
]
KEXUE = [4.3e3, 1.2e4, 2.7e4, 8.4e4, 2.3e5, 6.3e5, 2.1e6, 4.9e6, 2.4e7, 5.8e7, 6.5e7]


@pytest.mark.parametrize(("base", "first"), [(1e4, 1707), (5e5, 18438), (1e6, 27115)])
def test_first_failure_known(base: float, first: int) -> None:
    assert first_failure(base, 128, 100_000) == first
    assert first_failure(base, 128, first + 1) == first
    assert first_failure(base, 128, first) is None  # m < limit is strict


@pytest.mark.parametrize("dim", [2, 4, 8, 20, 64, 128])
def test_first_failure_against_brute_force(dim: int) -> None:
    rng = np.random.default_rng(dim)
    for base in np.exp(rng.uniform(0.01, 16, 30)):
        for limit in (1, 2, 3, 255, 256, 257, 3000):
            assert first_failure(base, dim, limit) == brute_first(base, dim, limit)


def test_first_failure_past_one_block_of_rows() -> None:
    first = first_failure(1e7, 128, 1 << 18)
    assert first is not None and first > 1 << 16
    assert first == brute_first(1e7, 128, first + 1)


@pytest.mark.parametrize(("base", "dim", "length"), [(1e4, 128, 3000), (50.0, 64, 257), (1.5, 6, 1), (1e7, 2, 70_000)])
def test_preference_is_the_sum(base: float, dim: int, length: int) -> None:
    values, expected = preference(base, dim, length).numpy(), brute(base, dim, length)
    assert values.shape == expected.shape
    assert np.abs(values - expected).max() < 1e-9
    assert values[0] == dim / 2


def test_preference_next_to_zero_is_the_plain_sum_to_the_bit() -> None:
    """Else a plot would show a base at the edge of its island as failing while `first_failure` finds nothing."""
    exponents = torch.arange(0, 64, 2, dtype=torch.float64) / 64
    base = smallest_feasible_base(1024, 64)
    m = int(preference(base, 64, 1024).argmin())

    def plain(base: float) -> float:
        return float((m * base**-exponents).cos().sum())

    low = base * (1 - 1e-9)
    for _ in range(40):
        middle = (low + base) / 2
        low, base = (middle, base) if plain(middle) < 0 else (low, middle)
    for _ in range(40):
        assert float(preference(base, 64, 1024)[m]) == plain(base)
        assert (first_failure(base, 64, 1024) is None) == (plain(base) >= 0)
        base = math.nextafter(base, 1)
    assert plain(base) < 0


def test_a_base_near_one_fails_at_two() -> None:
    assert first_failure(1 + 1e-9, 64, 100) == 2  # f = d/2 cos(m), and cos(2) is the first below 0


@pytest.mark.parametrize(("length", "smallest", "largest"), SHORT)
def test_known_answers(length: int, smallest: float, largest: float) -> None:
    answer = base_report(length, 128)
    assert answer.smallest_feasible == pytest.approx(smallest, rel=1e-8)
    assert answer.largest_infeasible == pytest.approx(largest, rel=1e-8)
    check_edges(length, 128, answer.smallest_feasible, answer.largest_infeasible)


@pytest.mark.parametrize(("length", "smallest", "largest"), LONG[:2])
def test_known_answers_long(length: int, smallest: float, largest: float) -> None:
    test_known_answers(length, smallest, largest)


@pytest.mark.parametrize(("length", "smallest", "largest"), LONG[2:])
def test_known_answers_long_are_edges(length: int, smallest: float, largest: float) -> None:
    """The search for them takes longer than the rest of this file."""
    check_edges(length, 128, smallest * (1 + 1e-8), largest * (1 - 1e-8), within=3e-8)


def test_known_answers_agree_with_kexue_10122() -> None:
    for (_, smallest, _), page in zip(SHORT + LONG, KEXUE, strict=True):
        assert float(f"{smallest:.1e}") == page


def check_edges(length: int, dim: int, smallest: float, largest: float | None, within: float = 3 * RESOLUTION) -> None:
    """Both bases are feasible or infeasible as they should be, and lie on an edge."""
    assert first_failure(smallest, dim, length) is None
    assert first_failure(smallest * (1 - within), dim, length) is not None
    assert largest is not None
    assert first_failure(largest, dim, length) is not None
    assert first_failure(largest * (1 + within), dim, length) is None


@pytest.mark.parametrize(("length", "dim"), [(512, 8), (200, 16), (512, 16), (512, 64), (511, 64), (64, 6), (400, 128)])
def test_against_brute_force_over_bases(length: int, dim: int) -> None:
    smallest, largest = smallest_feasible_base(length, dim), largest_infeasible_base(length, dim)
    check_edges(length, dim, smallest, largest)
    assert largest is not None
    grid = np.exp(np.linspace(1e-6, math.log(min(ceiling_base(length, dim), 50 * largest)), 2500))
    edges = [smallest * (1 - 10.0**-k) for k in range(2, 9)] + [largest * (1 + 10.0**-k) for k in range(2, 9)]
    feasible = {b: brute(b, dim, length).min() >= 0 for b in [*grid, *edges]}
    assert not any(ok for b, ok in feasible.items() if b < smallest)
    assert all(ok for b, ok in feasible.items() if b > largest)


def carries(base: float, dim: int, length: int) -> bool:
    """True if the base is feasible, by numpy sums of cosines; near distances first, where most bases fail."""
    theta, start = float(base) ** (-2 * np.arange(dim // 2) / dim), 0
    for stop in (16, 64, 256, 1024, 4096):
        m = np.arange(start, min(stop, length))
        if (np.cos(m[:, None] * theta).sum(1) < 0).any():
            return False
        start = stop
    assert length <= start
    return True


@pytest.mark.parametrize(
    ("length", "dim", "answer"),
    [
        (4096, 64, 100070.29),
        (2048, 256, 6563.948),
    ],
)
def test_smallest_by_a_grid_of_bases(length: int, dim: int, answer: float) -> None:
    smallest = smallest_feasible_base(length, dim)
    assert smallest == pytest.approx(answer, rel=1e-6)
    assert carries(smallest * (1 + 1e-12), dim, length)
    below = np.linspace(1e-6, math.log(smallest), 1500, endpoint=False)
    near = math.log(smallest) - np.geomspace(3e-10, 1e-2, 200)
    assert not any(carries(base, dim, length) for base in np.exp([*below, *near]))


def test_feasibility_is_not_monotone() -> None:
    """Bases 4294 and 6019 are feasible for 1024 tokens and 5000 is not, so bisection would be wrong."""
    assert [first_failure(b, 128, 1024) is None for b in (4000, 4294, 5000, 6019)] == [False, True, False, True]


def test_a_rounded_answer_can_fail() -> None:
    """11587.24 is feasible for 2048 tokens; 12000, the same to two digits and larger, is not."""
    smallest = smallest_feasible_base(2048, 128)
    assert float(f"{smallest:.1e}") == 12000 and first_failure(12000, 128, 2048) == 1554


def test_at_least_returns_a_feasible_base_unchanged() -> None:
    assert smallest_feasible_base(1024, 128, at_least=4294) == 4294
    assert smallest_feasible_base(1024, 128, at_least=1e6) == 1e6
    assert smallest_feasible_base(1, 64, at_least=3.0) == 3.0


def test_at_least_finds_the_next_island() -> None:
    start = 4500.0
    assert first_failure(start, 128, 1024) is not None
    base = smallest_feasible_base(1024, 128, at_least=start)
    assert start < base < 6019 and first_failure(base, 128, 1024) is None
    assert all(brute(b, 128, 1024).min() < 0 for b in np.linspace(start, base * (1 - 1e-9), 800))


def test_smallest_grows_with_the_length_and_is_feasible() -> None:
    answers = [smallest_feasible_base(n, 64) for n in (100, 300, 1000, 3000)]
    assert answers == sorted(answers)
    assert all(first_failure(b, 64, n) is None for b, n in zip(answers, (100, 300, 1000, 3000), strict=True))


@pytest.mark.parametrize(("length", "dim"), [(1024, 128), (512, 16), (300, 6), (1 << 20, 128)])
def test_ceiling_holds_by_its_own_bound(length: int, dim: int) -> None:
    ceiling = ceiling_base(length, dim)
    for base, sign in ((ceiling, 1), (ceiling * (1 - 1e-6), -1)):
        phases = (length - 1) * base ** (-2 * np.arange(dim // 2) / dim)
        assert np.where(phases <= np.pi, np.cos(phases), -1.0).sum() * sign >= 0
    assert first_failure(ceiling, dim, min(length, 4096)) is None


def test_lengths_for_which_every_base_is_feasible() -> None:
    assert largest_infeasible_base(1, 64) is None
    assert largest_infeasible_base(2, 64) is None
    assert largest_infeasible_base(3, 64) is not None
    assert smallest_feasible_base(2, 64) == pytest.approx(1, abs=1e-5)


def test_report_fields() -> None:
    answer = base_report(2048, 128, base=1e4)
    assert (answer.length, answer.dim, answer.base, answer.fails_at) == (2048, 128, 1e4, 1707)
    assert answer.asymptotic == pytest.approx(3321.98, abs=0.01)
    assert answer.smallest_feasible < answer.largest_infeasible < answer.ceiling  # type: ignore[operator]
    assert answer.resolution == RESOLUTION
    assert base_report(64, 16, base=1e9).fails_at is None
    assert base_report(64, 16).base is None


def test_the_thread_count_is_restored() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        base_report(64, 16, base=50.0)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: first_failure(1e4, 7, 10), "dim 7"),
        (lambda: first_failure(1e4, 0, 10), "dim 0"),
        (lambda: first_failure(1e4, 64, 0), "length 0"),
        (lambda: first_failure(1.0, 64, 10), "base 1 "),
        (lambda: first_failure(math.nan, 64, 10), "base nan"),
        (lambda: smallest_feasible_base(0, 64), "length 0"),
        (lambda: smallest_feasible_base(10, 63), "dim 63"),
        (lambda: smallest_feasible_base(10, 4), "dim 4"),
        (lambda: smallest_feasible_base(10, 64, at_least=0.5), "base 0.5"),
        (lambda: largest_infeasible_base(0, 64), "length 0"),
        (lambda: ceiling_base(10, 2), "dim 2"),
        (lambda: base_report(10, 64, base=math.inf), "base inf"),
        (lambda: first_failure(1e4, 64, 2**24 + 1), "length 16777217 is above 16M"),
        (lambda: base_report(10 * 2**30, 64), "length 10240M is above 16M"),
        (lambda: BaseBound(length=2**30).check(RopeSpec(dim=64, base=1e4, trained_length=64)), "1024M is above 16M"),
    ],
)
def test_errors_name_the_value(call: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        call()  # type: ignore[operator]
