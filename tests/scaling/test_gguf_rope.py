"""The RoPE of a GGUF file: a scaler that was written is read as the same scaler or the same numbers."""

import pytest
import torch
from static_specs import STATIC

from ropewalk.errors import ConfigError
from ropewalk.scaling import Linear, Llama3, LongRoPE, Scaler, YaRN
from ropewalk.scaling.gguf_rope import GgufRope
from ropewalk.scaling.rope import RopeSpec
from ropewalk.scaling.spec import parse

ROPE = RopeSpec(dim=64, base=10_000.0, trained_length=2048)


@pytest.mark.parametrize("spec", STATIC)
def test_what_is_written_is_read_again(spec):
    scaler = parse(spec, ROPE.trained_length)
    file = GgufRope.of(ROPE, scaler)
    read = file.configured(8192)
    wanted, computed = scaler.frequencies(ROPE), read.scaler.frequencies(read.rope)
    torch.testing.assert_close(computed.inv_freq, wanted.inv_freq, rtol=1e-6, atol=1e-30)
    assert computed.attention_factor == pytest.approx(wanted.attention_factor, rel=1e-6)
    assert read.max_length == 8192
    if file.scaling:
        assert read.rope.trained_length == file.scaling.get("original_context_length", 8192)


@pytest.mark.parametrize(
    ("spec", "scaling"),
    [
        ("none", {}),
        ("linear:4", {"type": "linear", "factor": 4.0}),
        ("yarn:4", {"type": "yarn", "factor": 4.0, "original_context_length": 2048}),
        ("yarn:4,attention_factor=1.3", {"original_context_length": 2048, "attn_factor": 1.3}),
        ("ntk-mixed:4", {"original_context_length": 2048}),
    ],
)
def test_the_simplest_form_is_taken(spec, scaling):
    file = GgufRope.of(ROPE, parse(spec))
    assert file.scaling == scaling
    assert (file.dim, file.base) == (64, 1e4)
    assert (file.divisors is None) == (scaling == {} or "type" in scaling)
    if file.divisors is not None:
        assert file.divisors.dtype == torch.float32
    assert GgufRope.of(ROPE, parse("base:2e5")).base == 2e5


def test_divisors_of_llama_3_are_known():
    llama = RopeSpec(dim=64, base=5e5, trained_length=8192)
    read = GgufRope.of(llama, Llama3(factor=8)).configured(131072)
    assert read.scaler == Llama3(factor=8)
    assert read.rope == llama
    assert read.max_length == 131072
    file = GgufRope.of(llama, Llama3(factor=8))
    warm = GgufRope(dim=64, base=5e5, divisors=file.divisors, scaling={"attn_factor": 1.1}).configured(131072)
    assert isinstance(warm.scaler, LongRoPE) and warm.scaler.attention_factor == 1.1


def test_factors_of_other_files():
    divisors = torch.linspace(1, 3, 32)
    read = GgufRope(dim=64, base=1e4, divisors=divisors, scaling={"original_context_length": 2048}).configured(8192)
    assert read.scaler == LongRoPE(
        factor=4.0,
        short=tuple(divisors.double().tolist()),
        long=tuple(divisors.double().tolist()),
        attention_factor=1.0,
    )
    assert GgufRope(dim=64, base=1e4, divisors=divisors).configured(1024).scaler.factor == 1.0
    alone = GgufRope(dim=64, base=1e4, scaling={"attn_factor": 1.25}).configured(4096)
    assert alone.scaler.short == (1.0,) * 32 and alone.scaler.attention_factor == 1.25
    less = GgufRope(dim=64, base=1e4, scaling={"original_context_length": 4096, "attn_factor": 1.25}).configured(2048)
    assert (less.scaler.factor, less.max_length) == (1.0, 4096)


@pytest.mark.parametrize(
    ("scaling", "reach"),
    [
        ({"type": "linear", "factor": 4.0, "original_context_length": 2048}, 8192),
        ({"type": "linear", "factor": 4.0}, 2048),  # the length can include the factor already
        ({"type": "yarn", "factor": 4.0, "original_context_length": 2048}, 8192),
        ({"type": "yarn", "factor": 4.0}, 8192),
        ({"original_context_length": 2048}, 2048),
        ({}, 2048),
    ],
)
def test_a_context_length_that_stayed_at_the_trained_one(scaling, reach):
    configured = GgufRope(dim=64, base=1e4, scaling=scaling).configured(2048)
    assert configured.reach(Scaler()) == configured.max_length == reach
    if scaling.get("type") != "yarn" or "original_context_length" in scaling:  # else yarn scales the length of the file
        assert GgufRope(dim=64, base=1e4, scaling=scaling).configured(16384).max_length == 16384


def test_llama_3_divisors_in_a_file_of_a_short_context():
    llama = RopeSpec(dim=64, base=5e5, trained_length=8192)
    assert GgufRope.of(llama, Llama3(factor=8)).configured(8192).max_length == 8 * 8192


def test_kinds_and_factors_are_read_as_in_llama_cpp():
    for scaling, scaler in (
        ({}, Scaler()),
        ({"type": "none"}, Scaler()),
        ({"type": "linear", "factor": 4.0}, Linear(factor=4.0)),
        ({"type": "linear", "factor": 0.0}, Linear(factor=1.0)),
        ({"type": "linear"}, Linear(factor=1.0)),
        ({"type": "yarn", "factor": 4.0}, YaRN(factor=4.0)),
    ):
        assert GgufRope(dim=64, base=1e4, scaling=scaling).configured(2048).scaler == scaler


def test_refusals():
    with pytest.raises(
        ConfigError, match=r"^dynamic-ntk depends on the length of the text, and a GGUF file has one set"
    ):
        GgufRope.of(ROPE, parse("dynamic-ntk"))
    both = GgufRope(dim=64, base=1e4, scaling={"type": "yarn", "factor": 4.0}, divisors=torch.ones(32))
    with pytest.raises(
        ConfigError, match=r"^rotary scaling of type 'yarn' with divisors or attn_factor is not supported$"
    ):
        both.configured(2048)
    with pytest.raises(ConfigError):
        GgufRope(dim=64, base=1e4, divisors=torch.ones(31)).configured(2048)
