"""The rules for a base: the formula of each, its failure by brute force, and its spec string."""

from __future__ import annotations

import math

import pytest
import torch
from closed_forms import brute_first

from ropewalk.errors import ConfigError
from ropewalk.scaling import Base, BaseBound, RopeSpec, parse
from ropewalk.scaling.base import BaseRule, base_rules, round_up, with_base
from ropewalk.scaling.base_bound import first_failure, largest_infeasible_base, smallest_feasible_base

LLAMA = RopeSpec(dim=128, base=1e4, trained_length=1024)
SMALL = RopeSpec(dim=64, base=1e5, trained_length=2048)


def by_name(rope: RopeSpec, length: int) -> dict[str, BaseRule]:
    return {rule.name: rule for rule in base_rules(rope, length)}


def test_every_rule_is_its_formula() -> None:
    rules = by_name(LLAMA, 4096)
    assert next(iter(rules)) == "own base" and rules["own base"].base == 1e4
    assert rules["NTK-aware"].base == pytest.approx(1e4 * 4 ** (128 / 126), rel=1e-12)
    critical = 1e4 ** (math.log(4096 / (2 * math.pi)) / math.log(1024 / (2 * math.pi)))
    assert rules["critical base"].base == pytest.approx(critical, rel=1e-12)
    assert rules["smallest feasible"].base == pytest.approx(26952.3392, rel=1e-8)
    assert rules["every base above"].base == pytest.approx(58789.5041, rel=1e-8)
    assert rules["paper's fit"].base == pytest.approx(0.0424 * 4096**1.628, rel=1e-5)
    assert rules["asymptotic"].base == pytest.approx(4096 / 0.6165, rel=1e-5)


def test_the_fit_is_near_the_smallest_feasible_bases() -> None:
    """Figure 1 of arXiv 2405.14591 draws the line through the smallest feasible bases."""
    for length in (1024, 4096, 32768):
        fit = 0.0424 * length**1.628
        assert 1 / 1.6 < fit / smallest_feasible_base(length, 128) < 1.6


@pytest.mark.parametrize(("rope", "length"), [(LLAMA, 4096), (LLAMA, 1024), (SMALL, 5000)])
def test_verdicts_by_brute_force(rope: RopeSpec, length: int) -> None:
    rules = base_rules(rope, length)
    assert [rule.fails_at for rule in rules] == [brute_first(rule.base, rope.dim, length) for rule in rules]
    named = {rule.name: rule for rule in rules}
    assert named["smallest feasible"].fails_at is None and named["every base above"].fails_at is None
    assert named["asymptotic"].fails_at is not None


@pytest.mark.parametrize(("rope", "length"), [(LLAMA, 4096), (SMALL, 5000)])
def test_a_spec_uses_its_base(rope: RopeSpec, length: int) -> None:
    rules = base_rules(rope, length)
    for rule in rules:
        wanted, parsed = with_base(rope, rule.base).inv_freq, parse(rule.spec).frequencies(rope).inv_freq
        assert torch.allclose(wanted, parsed, rtol=1e-8, atol=0), rule
    kinds = [rule.spec.partition(":")[0] for rule in rules]
    assert kinds == ["base", "ntk", "critical-base", "base-bound", "base", "base", "base"]
    for rule in rules:
        if isinstance(scaler := parse(rule.spec), Base):
            assert scaler.base == rule.base


def test_the_smallest_starts_at_the_models_own_base() -> None:
    """Base 5000 lies between the smallest feasible for 1k, 4293.4, and the next island, so 4293.4 is not the result."""
    rope = RopeSpec(dim=128, base=5000, trained_length=1024)
    rule = by_name(rope, 1024)["smallest feasible"]
    assert rule.base > 5000 and first_failure(rule.base, 128, 1024) is None
    assert rule.base == BaseBound(length=1024).base(rope)


def test_a_model_whose_base_is_above_all_failures_keeps_it() -> None:
    rope = RopeSpec(dim=64, base=1e9, trained_length=1024)
    rules = by_name(rope, 2048)
    assert rules["smallest feasible"].base == rules["every base above"].base == 1e9
    assert rules["own base"].fails_at is None


def test_rounding_goes_up_and_does_not_change_short_numbers() -> None:
    assert [f"{round_up(base):f}" for base in (1e4, 53151.7, 3325751.032)] == ["10000", "53151.7", "3325751.032"]
    for length in (1000, 1024, 3000):
        largest = largest_infeasible_base(length, 64)
        assert largest is not None
        assert largest < by_name(SMALL, 2048 + length)["every base above"].base
        assert 0 <= float(round_up(largest)) / largest - 1 < 1e-9


@pytest.mark.parametrize(
    ("rope", "length", "words"),
    [
        (SMALL, 1024, "length 1024 is below the trained length 2048"),
        (RopeSpec(dim=64, base=1e5, trained_length=64, rotating_pairs=8), 128, "8 of 32 pairs rotate"),
        (RopeSpec(dim=4, base=1e5, trained_length=64), 128, "dim 4 must be even and at least 6"),
        (RopeSpec(dim=64, base=1e5, trained_length=6), 128, "trained length 6"),
        (
            RopeSpec(dim=64, base=1e4, trained_length=7),
            1 << 17,
            "base 10000 is raised to the power 92.*exceeds float64",
        ),
    ],
)
def test_refusals_of_the_rules(rope: RopeSpec, length: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        base_rules(rope, length)
