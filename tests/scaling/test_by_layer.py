"""Scalers for some layers: their spec, what they compose with, and the scaler of every layer."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ropewalk.errors import ConfigError
from ropewalk.scaling import NTK, LogN, OnLayers, ReRoPE, RopeSpec, Scaler, YaRN, compose, hf, parse
from ropewalk.scaling.by_layer import format_layers, layer_groups, parse_layers
from ropewalk.scaling.configured_rope import ConfiguredRope

ROPE = RopeSpec(dim=64, base=1e4, trained_length=2048)
CONFIGURED = ConfiguredRope(rope=ROPE, scaler=Scaler(), max_length=2048, layers=tuple(range(4)))
YARN2, YARN4 = YaRN(factor=2), YaRN(factor=4)


def test_every_layer_has_the_methods_that_name_it() -> None:
    scaler = parse("yarn:2@0-1|yarn:4@2-|rerope:512@1/3|logn")
    near = ReRoPE(window=512)
    expected = [YARN2 | LogN(), YARN2 | near | LogN(), YARN4 | LogN(), YARN4 | near | LogN(), YARN4 | LogN()]
    assert [scaler.on(layer) for layer in range(5)] == expected
    assert scaler.differs_by_layer and not any(each.differs_by_layer for each in expected)
    assert parse("yarn:4@3").on(0) == Scaler()


def test_all_layers_are_no_restriction() -> None:
    assert parse("yarn:2@0-|logn") == parse("yarn:2|logn") == parse("yarn:2 @ 0-3/4- | logn")
    uniform = parse("yarn:2|logn")
    assert uniform.on(3) is uniform


@st.composite
def layer_sets(draw: st.DrawFn) -> set[int]:
    return draw(st.sets(st.integers(0, 30), min_size=1))


def ranges(indices: set[int]) -> tuple[range, ...]:
    firsts = [i for i in sorted(indices) if i - 1 not in indices]
    lasts = [i for i in sorted(indices) if i + 1 not in indices]
    return tuple(range(first, last + 1) for first, last in zip(firsts, lasts, strict=True))


@given(layer_sets(), layer_sets())
def test_layers_are_a_set_of_indices(one: set[int], other: set[int]) -> None:
    layers = ranges(one)
    assert parse_layers(format_layers(layers)) == layers
    assert parse_layers("/".join(map(str, sorted(one)))) == layers
    first = OnLayers(scaler=YARN2, layers=layers)
    assert parse(str(first)) == first
    second = OnLayers(scaler=NTK(factor=3), layers=ranges(other))
    if one & other:
        with pytest.raises(ConfigError, match=f"both set the frequencies of layer {min(one & other)};"):
            _ = first | second
        return
    both = first | second
    assert parse(str(both)) == both
    for layer in range(33):
        expected = YARN2 if layer in one else NTK(factor=3) if layer in other else Scaler()
        assert both.on(layer) == expected
    groups = layer_groups(both, 33)
    assert {layer: each for each, parts in groups.items() for part in parts for layer in part} == {
        layer: both.on(layer) for layer in range(33)
    }


def test_the_groups_of_a_model_without_end() -> None:
    assert layer_groups(parse("yarn:2@3|logn")) == {
        parse("logn"): (range(3), range(4, sys.maxsize)),
        parse("yarn:2|logn"): (range(3, 4),),
    }
    assert layer_groups(YARN2) == {YARN2: (range(sys.maxsize),)}
    assert layer_groups(parse("yarn:2@0-1|yarn:4@2-7"), 4) == {YARN2: (range(2),), YARN4: (range(2, 4),)}


def test_the_reach_is_the_smallest_of_the_layers() -> None:
    for spec, reach in [
        ("yarn:2@0-1|yarn:4@2-", 4096),
        ("yarn:4@0-2|yarn:3@3", 6144),
        ("yarn:4@0-2", 2048),
        ("self-extend:4,window=1k@1|yarn:2@0/2-", 4096),
        ("rerope:512@0-1|rerope:256@2-", float("inf")),
        ("yarn:4|logn@0", 8192),
    ]:
        assert CONFIGURED.reach(parse(spec)) == reach, spec
    own = ConfiguredRope(rope=ROPE, scaler=YARN4, max_length=8192, layers=(0, 1))
    assert own.reach(parse("logn@0")) == 8192
    with pytest.raises(ConfigError, match="yarn:2 replaces this model's own yarn scaling and reaches 4k tokens"):
        own.check(parse("yarn:2@1"))


def test_every_layer_is_checked() -> None:
    CONFIGURED.check(parse("rerope:1k@0"))
    with pytest.raises(ConfigError, match="window"):
        CONFIGURED.check(parse("rerope:4k@1"))
    with pytest.raises(ConfigError, match="it is not known which layers have which frequencies"):
        ConfiguredRope(rope=ROPE, scaler=Scaler(), max_length=2048).check(parse("yarn:2@1"))


def test_a_config_says_which_layers_have_an_embedding() -> None:
    llama = {"model_type": "llama", "num_hidden_layers": 3, "hidden_size": 64, "num_attention_heads": 4}
    assert hf.read(llama)[None].layers == (0, 1, 2)
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    read = hf.read({**llama, "model_type": "gemma3_text", "layer_types": types})
    assert {kind: rope.layers for kind, rope in read.items()} == {"sliding_attention": (0, 2), "full_attention": (1,)}


def test_nothing_is_computed_for_all_layers_together() -> None:
    scaler = parse("yarn:2@0-3")
    for compute in (
        lambda: scaler.frequencies(ROPE),
        lambda: scaler.bands(ROPE),
        lambda: scaler.logit_factor(torch.tensor([1]), ROPE),
        lambda: scaler.reach(ROPE),
        lambda: scaler.check(ROPE),
        lambda: scaler.growing_step(ROPE),
        lambda: scaler.on_grid(YARN2.frequencies(ROPE)),
        lambda: parse("yarn:2@0|yarn:4@1-|logn").frequencies(ROPE),
        lambda: parse("logn|rerope:5@1").bands(ROPE),
    ):
        with pytest.raises(ConfigError, match="is for some layers only"):
            compute()
    assert torch.equal(parse("yarn:2|logn@1").frequencies(ROPE).inv_freq, YARN2.frequencies(ROPE).inv_freq)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("yarn:4@", "'' are no layers; write 12, 0-9"),
        ("yarn:4@a", "' ?a' are no layers"),
        ("yarn:4@-3", "'-3' are no layers"),
        ("yarn:4@1,2", "'1,2' are no layers"),
        ("yarn:4@0-1@3", "'0-1@3' are no layers"),
        ("yarn:4@9-3", "layers '9-3' must increase"),
        ("yarn:4@3/2", "layers '3/2' must increase"),
        ("yarn:4@0-3/3", "layers '0-3/3' must increase"),
        ("yarn:4@0-/5", "layers '0-/5' must increase"),
        ("yarn:4|ntk:2@3", "'yarn' and 'ntk:2@3' both set the frequencies of layer 3"),
        ("none@3", "none cannot be for some layers"),
        ("auto@3", "auto cannot be for some layers"),
    ],
)
def test_mistakes(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(spec)


@pytest.mark.parametrize("layers", [(), (range(3, 3),), (range(0, 8, 2),), (range(-2, 3),)])
def test_ranges_that_are_no_layers(layers: tuple[range, ...]) -> None:
    with pytest.raises(ConfigError, match="must be ranges of indices"):
        OnLayers(scaler=YARN2, layers=layers)


def test_ranges_that_have_another_form() -> None:
    with pytest.raises(ConfigError, match="must increase, with a gap"):
        OnLayers(scaler=YARN2, layers=(range(3), range(3, 5)))
    with pytest.raises(ConfigError, match="these are all layers; use yarn:2 itself"):
        OnLayers(scaler=YARN2, layers=(range(sys.maxsize),))
    with pytest.raises(ConfigError, match="only single methods"):
        OnLayers(scaler=compose(YARN2, LogN()), layers=(range(3),))
