"""Scalers written into configs are read as the same ones, here and in transformers."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import transformers
from geometries import SMALL
from hf_configs import TINY, TYPES, assert_like_its_model, llama, old
from hypothesis import given
from hypothesis import strategies as st

from ropewalk.errors import ConfigError
from ropewalk.scaling import (
    NTK,
    AlphaRoPE,
    Base,
    BaseBound,
    CoPE,
    CriticalBase,
    DynamicNTK,
    DynamicYaRN,
    Linear,
    Llama3,
    LongRoPE,
    MrRoPE,
    NTKByParts,
    NTKFixed,
    NTKMixed,
    Resonance,
    RopeSpec,
    Scaler,
    StepLog,
    YaRN,
)
from ropewalk.scaling.hf import ConfiguredRope, read, write


def reread(parameters: dict[str, Any], **fields: Any) -> ConfiguredRope:
    """The config after JSON and transformers' class, whose rotary module must agree."""
    config = transformers.LlamaConfig(
        **{**TINY, "max_position_embeddings": 256, **fields, "rope_parameters": json.loads(json.dumps(parameters))}
    )
    return assert_like_its_model(config)[None]


NATIVE: list[tuple[Scaler, str]] = [
    (Scaler(), "default"),
    (Linear(factor=1), "default"),
    (Linear(factor=4), "linear"),
    (NTK(factor=4), "default"),
    (Base(base=5e5), "default"),
    (CriticalBase(length=1024), "default"),
    (DynamicNTK(factor=2), "dynamic"),
    (YaRN(factor=4), "yarn"),
    (YaRN(factor=4, truncate=False, beta_fast=16, beta_slow=2), "yarn"),
    (YaRN(factor=4, mscale=1, mscale_all_dim=0.7), "yarn"),
    (YaRN(factor=4, attention_factor=1.2), "yarn"),
    (NTKByParts(factor=4), "yarn"),
    (Llama3(factor=8, low_freq_factor=0.5, high_freq_factor=3), "llama3"),
    (LongRoPE(factor=4, short=tuple(range(1, 9)), long=tuple(range(2, 10))), "longrope"),
    (LongRoPE(factor=4, short=(1.0,) * 8, long=(2.0,) * 8, attention_factor=1.1), "longrope"),
]
CARRIED: list[Scaler] = [
    NTKFixed(factor=4),
    NTKMixed(factor=8, b=0.5),
    MrRoPE(factor=4),
    MrRoPE(factor=4, uniform=True),
    AlphaRoPE(factor=4),
    CoPE(),
    Resonance(),
    YaRN(factor=4) | Resonance(),
    LongRoPE(factor=4, short=(1.0,) * 8, long=(2.5,) * 8) | Resonance(),
]


def assert_same(scaler: Scaler, rope: RopeSpec, back: ConfiguredRope, rtol: float) -> None:
    for length in (1, rope.trained_length, rope.trained_length + 1, 8 * rope.trained_length):
        ours, theirs = scaler.frequencies(rope, length), back.scaler.frequencies(back.rope, length)
        # 1e-25 radians per token is no rotation.
        torch.testing.assert_close(ours.inv_freq, theirs.inv_freq, rtol=rtol, atol=1e-25)
        assert theirs.attention_factor == pytest.approx(ours.attention_factor, rel=1e-12)


@pytest.mark.parametrize(("scaler", "rope_type"), NATIVE, ids=str)
def test_native_types(scaler: Scaler, rope_type: str) -> None:
    parameters = write(SMALL, scaler)
    assert parameters["rope_type"] == rope_type
    back = reread(parameters)
    assert_same(scaler, SMALL, back, rtol=1e-6)  # another base is rounded to float32 again
    if rope_type not in ("default", "linear"):
        assert back.rope == SMALL
        if type(scaler) is not NTKByParts:
            assert back.scaler == scaler


@pytest.mark.parametrize("scaler", [Scaler(), NTK(factor=4), YaRN(factor=4, attention_factor=1.2)], ids=str)
def test_every_method_is_written_as_longrope_on_request(scaler: Scaler) -> None:
    parameters = write(SMALL, scaler, as_longrope=True)
    assert parameters["rope_type"] == "longrope"
    assert_same(scaler, SMALL, reread(parameters), rtol=1e-6)


@pytest.mark.parametrize("scaler", CARRIED, ids=str)
def test_the_others_are_written_as_longrope_exactly(scaler: Scaler) -> None:
    parameters = write(SMALL, scaler)
    assert parameters["rope_type"] == "longrope"
    back = reread(parameters)
    assert_same(scaler, SMALL, back, rtol=1e-12)
    assert back.rope == SMALL
    assert isinstance(back.scaler, LongRoPE)
    assert back.scaler.factor == max(scaler.reach(SMALL) / 256, 1)


def test_base_bound_is_written_as_its_base() -> None:
    pytest.importorskip("ropewalk.scaling.base_bound")
    parameters = write(SMALL, BaseBound(length=512))
    assert parameters == {"rope_type": "default", "rope_theta": BaseBound(length=512).base(SMALL)}


@pytest.mark.parametrize("name", TYPES)
def test_what_was_read_is_written_back(name: str) -> None:
    configured = read(llama(dict(TYPES[name])))[None]
    again = reread(write(configured.rope, configured.scaler), max_position_embeddings=1024)
    assert again.rope == configured.rope
    assert again.scaler == configured.scaler


@given(
    dim=st.integers(2, 32).map(lambda n: 2 * n),
    base=st.floats(100, 1e7),
    s=st.floats(1, 32),
    index=st.integers(0, len(CARRIED) - 2),
)
def test_longrope_factors_at_any_geometry(dim: int, base: float, s: float, index: int) -> None:
    rope = RopeSpec(dim=dim, base=base, trained_length=512)
    scaler = CARRIED[index]
    scaler = scaler.with_factor(s) if hasattr(scaler, "with_factor") else scaler
    parameters = write(rope, scaler)
    back = read(old(head_dim=dim, rope_parameters=json.loads(json.dumps(parameters, allow_nan=False))))[None]
    assert_same(scaler, rope, back, rtol=1e-12)


@pytest.mark.parametrize(
    ("scaler", "rope_type"),
    [
        (Scaler(), "proportional"),
        (Linear(factor=4), "proportional"),
        (NTK(factor=4), "proportional"),
        (YaRN(factor=4), "longrope"),
        (Llama3(), "longrope"),
        (LongRoPE(factor=4, short=(1.0,) * 8, long=(2.5,) * 8), "longrope"),
    ],
    ids=str,
)
def test_pairs_that_do_not_rotate_are_written(scaler: Scaler, rope_type: str) -> None:
    for rotating in (0, 1, 3, 7):
        rope = RopeSpec(dim=16, base=1e4, trained_length=256, rotating_pairs=rotating)
        parameters = write(rope, scaler)
        assert parameters["rope_type"] == rope_type
        if rotating:  # a share of 0 is not a valid RoPE
            assert_same(scaler, rope, reread(parameters), rtol=1e-6)


@given(part=st.integers(1, 128), whole=st.integers(2, 128))
def test_the_rotary_share_of_the_head_is_exact_in_spite_of_rounding(part: int, whole: int) -> None:
    head_dim, dim = 2 * whole, 2 * min(part, whole)
    rope = RopeSpec(dim=dim, base=1e4, trained_length=256)
    parameters = write(rope, YaRN(factor=2), head_dim=head_dim)
    assert read(old(head_dim=head_dim, rope_parameters=parameters))[None].rope == rope
    resting = RopeSpec(dim=head_dim, base=1e4, trained_length=1024, rotating_pairs=min(part, whole - 1))
    parameters = write(resting, Scaler(), head_dim=head_dim)
    assert read(old(head_dim=head_dim, rope_parameters=parameters))[None].rope == resting


def test_partial_rotary_models_keep_their_share() -> None:
    config = transformers.StableLmConfig(**TINY)
    configured = read(config)[None]
    parameters = write(configured.rope, NTKMixed(factor=4), head_dim=16)
    exported = transformers.StableLmConfig(**TINY, rope_parameters=parameters)
    back = assert_like_its_model(exported)[None]
    assert_same(NTKMixed(factor=4), configured.rope, back, rtol=1e-12)


def test_scalers_that_a_config_cannot_hold_are_refused() -> None:
    for scaler in (DynamicYaRN(), DynamicNTK() | Resonance(), DynamicYaRN() | Resonance()):
        with pytest.raises(ConfigError, match="depends on the length of the text in a way that no rope type"):
            write(SMALL, scaler)
    resting = RopeSpec(dim=16, base=1e4, trained_length=256, rotating_pairs=4)
    with pytest.raises(ConfigError, match="depends on the length"):
        write(resting, DynamicNTK())
    with pytest.raises(ConfigError, match="rotary dimension 16 of a head of 32 with 4 rotating pairs"):
        write(resting, Scaler(), head_dim=32)
    with pytest.raises(ConfigError, match="short has 3 numbers"):
        write(SMALL, LongRoPE(factor=2, short=(1.0,) * 3, long=(1.0,) * 3))


def test_facets_beyond_the_frequencies_are_refused() -> None:
    class Sharper(Scaler):
        name = "sharper"
        facet = "temperature"

    with pytest.raises(ConfigError, match="'sharper' sets the temperature, which a model file cannot hold"):
        write(SMALL, YaRN(factor=4) | Sharper())


@pytest.mark.parametrize(
    "scaler", [Scaler(), Linear(factor=4), YaRN(factor=4), Base(base=5e5), MrRoPE(factor=4)], ids=str
)
def test_a_temperature_of_the_models_own_is_written_beside_every_scaler(scaler: Scaler) -> None:
    own = StepLog(beta=0.25, length=256)
    parameters = write(SMALL, scaler, temperature=own)
    config = transformers.Ministral3Config(
        **{**TINY, "max_position_embeddings": 256}, head_dim=16, rope_parameters=json.loads(json.dumps(parameters))
    )
    configured = assert_like_its_model(config)[None]
    assert configured.temperature == own
    ours, theirs = scaler.frequencies(SMALL), configured.scaler.frequencies(configured.rope)
    assert torch.allclose(ours.inv_freq, theirs.inv_freq, rtol=1e-6)


def test_a_temperature_whose_length_is_another_one_is_not_written() -> None:
    own = StepLog(beta=0.25, length=64)
    assert write(SMALL, NTK(factor=4), temperature=own)["original_max_position_embeddings"] == 64
    with pytest.raises(ConfigError, match="takes its length from original_max_position_embeddings"):
        write(SMALL, YaRN(factor=4), temperature=own)
