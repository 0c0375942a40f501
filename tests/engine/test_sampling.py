"""Filters against their definitions on small vectors, and draws against probabilities."""

import math
from types import SimpleNamespace

import pytest
import torch

from ropewalk import ConfigError, SamplingParams
from ropewalk.engine.sampling import ResolvedParams, SeenTokens, filtered, not_finite, penalize_repetition, sample

LOGITS = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()


def remaining(**fields):
    return [i for i, x in enumerate(filtered(LOGITS, ResolvedParams(**fields)).tolist()) if x > -math.inf]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, [0, 1, 2, 3]),
        ({"top_k": 2}, [0, 1]),
        ({"top_k": 9}, [0, 1, 2, 3]),
        ({"top_p": 0.5}, [0]),
        ({"top_p": 0.51}, [0, 1]),
        ({"top_p": 0.79}, [0, 1]),
        ({"top_p": 1e-9}, [0]),
        ({"min_p": 0.31}, [0, 1]),
        ({"min_p": 0.29}, [0, 1, 2]),
        ({"min_p": 1.0}, [0]),
        ({"top_k": 3, "top_p": 0.6}, [0, 1]),
    ],
)
def test_filters_keep_what_their_definitions_say(fields, expected):
    assert remaining(**fields) == expected


def test_filters_do_not_depend_on_the_order_of_tokens():
    order = torch.tensor([2, 0, 3, 1])
    params = ResolvedParams(top_p=0.79, temperature=0.9)
    assert torch.equal(filtered(LOGITS[order], params), filtered(LOGITS, params)[order])


def test_draws_follow_the_softmax_at_the_temperature():
    generator = torch.Generator().manual_seed(0)
    params = ResolvedParams(temperature=2.0)
    draws = torch.tensor([sample(LOGITS, params, generator) for _ in range(20_000)])
    frequencies = torch.bincount(draws, minlength=4) / len(draws)
    expected = (LOGITS / 2).softmax(-1)
    assert (frequencies - expected).abs().max() < 4 * (expected * (1 - expected) / len(draws)).sqrt().max()


def test_greedy_takes_the_likeliest():
    assert sample(LOGITS.flip(0), ResolvedParams(temperature=0), torch.Generator()) == 3


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    logits = torch.tensor([2.0, -2.0, 1.0])
    got = penalize_repetition(logits, torch.tensor([0, 1, 1]), 2.0)
    assert got.tolist() == [1.0, -4.0, 1.0]


@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.5])
def test_tokens_seen_one_by_one_are_penalized_as_the_list_of_all_to_the_bit(penalty):
    random = torch.Generator().manual_seed(0)
    text, seen = torch.randint(0, 50, (300,), generator=random).tolist(), SeenTokens(penalty)
    seen.add(text[:100])
    for count in range(100, 300):
        logits = torch.randn(60, generator=random)
        assert torch.equal(seen.penalized(logits), penalize_repetition(logits, torch.tensor(text[:count]), penalty))
        seen.add([text[count]])


@pytest.mark.parametrize("continuation", ["off", "exact"])
@pytest.mark.parametrize("contexts", [None, ["import os", "def f(x)"]])
def test_a_step_under_a_repetition_penalty_does_not_build_the_text_again(model, monkeypatch, contexts, continuation):
    made, tensor = [], torch.tensor

    def counting(data, *rest, **options):
        made.append(len(data) if isinstance(data, list | tuple) else 1)
        return tensor(data, *rest, **options)

    prompt = "import os\ndef f(x):\n    retur" * 20
    params = SamplingParams(max_new_tokens=6, temperature=0, repetition_penalty=1.3, continuation=continuation)
    stream = model.stream(prompt, params, contexts=contexts)
    next(stream)
    monkeypatch.setattr(torch, "tensor", counting)
    for _ in stream:
        pass
    assert sum(made) < 60, made


@pytest.mark.parametrize(
    "fields",
    [
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"temperature": math.inf},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"repetition_penalty": 0.0},
        {"logprobs": -1},
        {"stop": ["a", ""]},
        {"temperature": 1e-38},
        {"temperature": "1"},
        {"seed": 2**64},
        {"seed": -1},
        {"seed": 1.5},
        {"max_new_tokens": 2.5},
        {"top_k": 2.5},
        {"max_time": "1"},
        {"stop": None},
        {"stop": [1]},
        {"continuation": True},
    ],
)
def test_values_out_of_range_are_refused(fields):
    with pytest.raises(ConfigError, match=next(iter(fields))):
        SamplingParams(**fields)


@pytest.mark.parametrize(("uniform", "expected"), [(0.0, 1), (0.24, 1), (0.26, 3), (1 - 2**-53, 3)])
def test_the_ends_of_the_unit_interval_draw_possible_tokens(monkeypatch, uniform, expected):
    """Probabilities 0, 1/4, 0, 3/4, 0: no draw gives a token that is impossible."""
    logits = torch.tensor([-math.inf, math.log(0.25), -math.inf, math.log(0.75), -math.inf])
    monkeypatch.setattr(torch, "rand", lambda *_, **options: torch.tensor(uniform, dtype=options["dtype"]))
    assert sample(logits, ResolvedParams(temperature=1), torch.Generator()) == expected


def test_draws_from_many_tokens_follow_their_probabilities():
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(1)) * 3
    generator = torch.Generator().manual_seed(2)
    draws = torch.tensor([sample(logits, ResolvedParams(temperature=1), generator) for _ in range(20_000)])
    expected = logits.double().softmax(-1) * len(draws)
    common = expected > 20
    counts = torch.bincount(draws, minlength=1000)
    statistic = float(((counts - expected) ** 2 / expected)[common].sum())
    degrees = int(common.sum())
    assert abs(statistic - degrees) < 5 * math.sqrt(2 * degrees)


def test_numbers_that_are_none_are_told_of_with_what_to_do():
    words = str(not_finite(SimpleNamespace()))
    assert words.startswith("the logits of this SimpleNamespace are NaN or infinite")
    assert words.endswith("take another scaler, or load with dtype='float32'")
