"""The frequency methods against transformers' own functions."""

from __future__ import annotations

import pytest
import torch
from geometries import MODELS
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ropewalk.scaling import (
    DynamicNTK,
    Linear,
    Llama3,
    LongRoPE,
    RopeSpec,
    Scaler,
    YaRN,
)


def theirs(
    rope_type: str,
    rope: RopeSpec,
    length: int | None = None,
    max_length: int | None = None,
    **parameters: object,
) -> tuple[torch.Tensor, float]:
    config = LlamaConfig(
        hidden_size=rope.dim,
        num_attention_heads=1,
        head_dim=rope.dim,
        max_position_embeddings=max_length or rope.trained_length,
        rope_parameters={"rope_type": rope_type, "rope_theta": rope.base, **parameters},
    )
    inv_freq, m = ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"), seq_len=length)
    return inv_freq.double(), m


def same_as_transformers(
    scaler: Scaler, rope: RopeSpec, expected: tuple[torch.Tensor, float], length: int = 1, rtol: float = 1e-6
) -> None:
    inv_freq, m = scaler.frequencies(rope, length)
    torch.testing.assert_close(inv_freq, expected[0], rtol=rtol, atol=0)
    assert m == pytest.approx(expected[1], rel=1e-12)


FACTORS = [1.0, 1.7, 4.0, 40.0]
over_models = pytest.mark.parametrize("rope", MODELS, ids=str)
over_factors = pytest.mark.parametrize("s", FACTORS)


@over_models
@over_factors
def test_transformers_linear(rope: RopeSpec, s: float) -> None:
    same_as_transformers(Linear(factor=s), rope, theirs("linear", rope, factor=s))


@over_models
@over_factors
@pytest.mark.parametrize("stretch", [0.5, 1, 1.5, 16])
def test_transformers_dynamic(rope: RopeSpec, s: float, stretch: float) -> None:
    length = int(rope.trained_length * stretch)
    same_as_transformers(DynamicNTK(factor=s), rope, theirs("dynamic", rope, length, factor=s), length)


@over_models
@over_factors
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"truncate": False},
        {"attention_factor": 1.3},
        {"mscale": 1.0, "mscale_all_dim": 1.0},
        {"mscale": 0.707, "mscale_all_dim": 1.2},
        {"beta_fast": 16.0, "beta_slow": 2.5},
        {"beta_fast": 64.0, "beta_slow": 0.5, "truncate": False},
    ],
    ids=str,
)
def test_transformers_yarn(rope: RopeSpec, s: float, fields: dict[str, float]) -> None:
    expected = theirs("yarn", rope, factor=s, original_max_position_embeddings=rope.trained_length, **fields)
    # transformers' ramp is float32; where 1 - r is small, its rounding error is multiplied by s.
    same_as_transformers(YaRN(factor=s, **fields), rope, expected, rtol=1e-6 + s * 2.0**-23)


@over_models
@over_factors
def test_transformers_longrope(rope: RopeSpec, s: float) -> None:
    half, L = rope.dim // 2, rope.trained_length
    short, long = [1 + i / half for i in range(half)], [1 + s * i / half for i in range(half)]
    given_m = {"attention_factor": 1.1}
    for fields in ({}, given_m):
        scaler = LongRoPE(factor=s, short=tuple(short), long=tuple(long), **fields)
        for length in (1, L, L + 1, 5 * L):
            expected = theirs(
                "longrope",
                rope,
                length,
                factor=s,
                short_factor=short,
                long_factor=long,
                original_max_position_embeddings=L,
                **fields,
            )
            same_as_transformers(scaler, rope, expected, length)


@over_models
@over_factors
@pytest.mark.parametrize("ends", [(1.0, 4.0), (0.5, 16.0)])
def test_transformers_llama3(rope: RopeSpec, s: float, ends: tuple[float, float]) -> None:
    expected = theirs(
        "llama3",
        rope,
        max_length=8 * rope.trained_length,
        factor=s,
        low_freq_factor=ends[0],
        high_freq_factor=ends[1],
        original_max_position_embeddings=rope.trained_length,
    )
    same_as_transformers(Llama3(factor=s, low_freq_factor=ends[0], high_freq_factor=ends[1]), rope, expected)


@over_models
@over_factors
@pytest.mark.parametrize("share", [1.0, 0.5, 0.25])
def test_transformers_proportional(rope: RopeSpec, s: float, share: float) -> None:
    pairs = int(share * rope.dim / 2)
    partial = RopeSpec(dim=rope.dim, base=rope.base, trained_length=rope.trained_length, rotating_pairs=pairs)
    same_as_transformers(Linear(factor=s), partial, theirs("proportional", rope, factor=s, partial_rotary_factor=share))
