"""Scalers as the `rope_parameters` of a Hugging Face config, for transformers and for serving engines."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from torch import Tensor

from ..errors import ConfigError
from .base import Base, BaseBound, CriticalBase
from .interpolation import NTK, DynamicNTK, Linear
from .longrope import LongRoPE
from .rope import Composition, Frequencies, RopeSpec, Scaler
from .temperature import StepLog
from .yarn import Llama3, NTKByParts, YaRN

__all__ = ["check_frequencies_only", "divisors", "write", "write_served"]

STEP_LOG_BETA = "llama_4_scaling_beta"
"""The key of `StepLog.beta` in a config; its length is `original_max_position_embeddings`."""

_NO_ROTATION = 1e30
"""Divisor of a pair that does not rotate: finite in float32 and in JSON, and the angle is 0 at every position."""

_NO_MSCALE = 1e-9
"""An `mscale_all_dim` without effect, because `mscale` needs one."""


def write(
    rope: RopeSpec,
    scaler: Scaler,
    *,
    head_dim: int | None = None,
    as_longrope: bool = False,
    temperature: Scaler | None = None,
) -> dict[str, Any]:
    """The `rope_parameters` with which unmodified transformers computes `scaler.frequencies(rope)`.

    A method that transformers has keeps its rope type. Every other static frequency method becomes LongRoPE factors
    with its own factor on cos and sin. The config also needs `max_position_embeddings`: the trained length for a
    dynamic method, the length to be served for the others.

    Args:
        head_dim: the dimension of the whole head, if only `rope.dim` of it rotates. It adds `partial_rotary_factor`,
            without which a family that rotates a part of the head uses its own default.
        as_longrope: write LongRoPE factors in any case, for families such as Phi-3 whose configs have no other type.
        temperature: the model's own temperature (`ConfiguredRope.temperature`), which its code reads from there.

    Raises:
        ConfigError: the scaler depends on the length in a way that transformers does not have, or it sets more than
            the frequencies, or the keys of the temperature have other values for the scaler.
    """
    check_frequencies_only(scaler)
    scaler.check(rope)
    parameters = (None if as_longrope else _native(rope, scaler)) or _as_longrope(rope, scaler)
    return _completed(rope, head_dim, _with_temperature(parameters, scaler, temperature))


def write_served(
    rope: RopeSpec,
    scaler: Scaler,
    *,
    head_dim: int | None = None,
    yarn_only: bool = False,
    as_longrope: bool = False,
) -> dict[str, Any]:
    """The `rope_parameters` from which transformers, vLLM and SGLang compute `scaler.frequencies(rope)`.

    vLLM and SGLang read LongRoPE's m from `short_mscale` and `long_mscale`, and SGLang ignores the `attention_factor`
    of yarn. So a scaler with its own m is written as LongRoPE with these keys.

    Args:
        yarn_only: True for a model with latent attention, such as DeepSeek-V3. Both engines read every scaling of it
            as yarn with `mscale` and `mscale_all_dim`, and ignore the rope type.
        as_longrope: as for `write`.

    Raises:
        ConfigError: the scaler depends on the length of the text, which these engines do not support, or sets more
            than the frequencies, or they cannot read it for a model with latent attention.
    """
    check_frequencies_only(scaler)
    scaler.check(rope)
    if scaler.depends_on_length:
        raise ConfigError(f"'{scaler}' depends on the length of the text, which vLLM and SGLang do not support")
    parameters = _native(rope, scaler)
    if yarn_only:
        return _completed(rope, head_dim, _read_as_yarn(scaler, parameters))
    if (
        as_longrope
        or parameters is None
        or parameters.keys() & {"attention_factor", "mscale", "short_factor"}
        or not parameters.get("truncate", True)
    ):
        parameters = _as_longrope(rope, scaler)
        parameters |= dict.fromkeys(("short_mscale", "long_mscale"), parameters["attention_factor"])
    return _completed(rope, head_dim, parameters)


def _read_as_yarn(scaler: Scaler, parameters: dict[str, Any] | None) -> dict[str, Any]:
    """The parameters of a base, or of a yarn whose `attention_factor` is written as the two mscales."""
    fits = parameters is not None and parameters["rope_type"] in ("default", "yarn")
    if parameters is None or not (fits and parameters.get("truncate", True)):
        raise ConfigError(
            f"'{scaler}' cannot be written for vLLM and SGLang. The attention of this model takes a softmax scale from "
            "rope_parameters, so they read every scaling of it as the yarn of DeepSeek, with truncated ends; take yarn "
            "or another base"
        )
    if "attention_factor" not in parameters:
        return parameters
    m, slope = parameters.pop("attention_factor"), 0.1 * math.log(parameters["factor"])
    all_dim = parameters.get("mscale_all_dim", _NO_MSCALE)
    mscale = all_dim if m == 1 else (m * (all_dim * slope + 1) - 1) / slope if slope else 0.0
    if mscale <= 0:
        raise ConfigError(
            f"'{scaler}' cannot be written for vLLM and SGLang. For this model they read attention_factor only from "
            f"mscale and mscale_all_dim, and {m:g} needs an mscale that is not above 0; take a larger one"
        )
    return {**parameters, "mscale": mscale, "mscale_all_dim": all_dim}


def _with_temperature(parameters: dict[str, Any], scaler: Scaler, temperature: Scaler | None) -> dict[str, Any]:
    if not isinstance(temperature, StepLog):
        return parameters
    key = "original_max_position_embeddings"
    if parameters.get(key, temperature.length) != temperature.length:
        raise ConfigError(
            f"'{scaler}' cannot be written for this model: its own {temperature} takes its length from {key}, which "
            f"must be {parameters[key]} for this scaler; patch the model where it runs"
        )
    return {**parameters, key: temperature.length, STEP_LOG_BETA: temperature.beta}


def _completed(rope: RopeSpec, head_dim: int | None, parameters: dict[str, Any]) -> dict[str, Any]:
    """`parameters` with the rotary part of the head, and with a float factor, which vLLM and SGLang need."""
    if "factor" in parameters:
        parameters = {**parameters, "factor": float(parameters["factor"])}
    if head_dim is None or head_dim == rope.dim:
        return parameters
    if parameters["rope_type"] == "proportional":
        raise ConfigError(
            f"rotary dimension {rope.dim} of a head of {head_dim} with {rope.rotating_pairs} rotating pairs "
            "cannot be written: transformers' proportional type spans the whole head"
        )
    return {**parameters, "partial_rotary_factor": _share(rope.dim, head_dim)}


def divisors(rope: RopeSpec, frequencies: Frequencies) -> Tensor:
    """The plain frequencies over `frequencies`, float64 [d/2]; finite for a pair that does not rotate."""
    plain = dataclasses.replace(rope, rotating_pairs=None).theta
    return (plain / frequencies.inv_freq).clamp(max=_NO_ROTATION)


def check_frequencies_only(scaler: Scaler) -> None:
    """Check that a scaler sets only the frequencies.

    Raises:
        ConfigError: it sets more; names the part that does.
    """
    if scaler.differs_by_layer:
        raise ConfigError(f"{scaler} differs by layer, which a model file cannot hold; patch the model where it runs")
    for part in scaler.parts:
        if part.facet not in ("frequencies", "wavelength grid"):
            raise ConfigError(
                f"{part.name!r} sets the {part.facet}, which a model file cannot hold; patch the model where it runs"
            )


def _native(rope: RopeSpec, scaler: Scaler) -> dict[str, Any] | None:
    """The parameters of transformers' own rope type for the method, or None if it has none."""
    match scaler:
        case Linear(factor=factor):
            return _plain(rope, rope.base, factor)
        case NTK(factor=factor):
            return _plain(rope, rope.base * factor ** (rope.dim / (rope.dim - 2)))
        case Base(base=base):
            return _plain(rope, base)
        case CriticalBase() | BaseBound():
            return _plain(rope, scaler.base(rope))
        case _ if type(scaler) is Scaler:
            return _plain(rope, rope.base)
    if rope.rotating_pairs is not None:
        return None  # only the proportional type has pairs that do not rotate
    trained = {"original_max_position_embeddings": rope.trained_length}
    match scaler:
        case DynamicNTK(factor=factor):
            return {"rope_type": "dynamic", "rope_theta": rope.base, "factor": factor}
        case NTKByParts():
            fields = dataclasses.asdict(scaler)
            if not isinstance(scaler, YaRN):
                fields["attention_factor"] = 1.0
            given = {key: value for key, value in fields.items() if value is not None}
            return {"rope_type": "yarn", "rope_theta": rope.base, **trained, **given}
        case Llama3():
            return {"rope_type": "llama3", "rope_theta": rope.base, **trained, **dataclasses.asdict(scaler)}
        case LongRoPE():
            return _longrope(rope, scaler.factor, list(scaler.short), list(scaler.long), scaler.attention_factor)
    return None


def _plain(rope: RopeSpec, base: float, factor: float = 1.0) -> dict[str, Any]:
    """Plain or linear frequencies of `base`."""
    if rope.rotating_pairs is not None:
        share = _share(2 * rope.rotating_pairs, rope.dim)
        parameters = {"rope_type": "proportional", "rope_theta": base, "partial_rotary_factor": share}
    else:
        parameters = {"rope_type": "default" if factor == 1 else "linear", "rope_theta": base}
    return parameters if factor == 1 else {**parameters, "factor": factor}


def _as_longrope(rope: RopeSpec, scaler: Scaler) -> dict[str, Any]:
    """The parameters of LongRoPE factors lambda_i = theta_i / theta'_i."""
    host = scaler.member("frequencies") if isinstance(scaler, Composition) else scaler
    if scaler.depends_on_length and not isinstance(host, LongRoPE):
        raise ConfigError(
            f"'{scaler}' depends on the length of the text in a way that no rope type of transformers does; "
            "write a static method such as yarn, or patch the model"
        )
    within, beyond = (scaler.frequencies(rope, rope.trained_length + more) for more in (0, 1))
    short, long = (divisors(rope, frequencies).tolist() for frequencies in (within, beyond))
    factor = max(scaler.reach(rope) / rope.trained_length, 1.0)
    return _longrope(rope, factor, short, long, within.attention_factor)


def _longrope(
    rope: RopeSpec, factor: float, short: list[float], long: list[float], attention_factor: float | None
) -> dict[str, Any]:
    parameters = {
        "rope_type": "longrope",
        "rope_theta": rope.base,
        "original_max_position_embeddings": rope.trained_length,
        "factor": factor,
        "short_factor": short,
        "long_factor": long,
    }
    return parameters if attention_factor is None else {**parameters, "attention_factor": attention_factor}


def _share(part: int, whole: int) -> float:
    """part / whole, rounded such that int(whole * share) is `part`."""
    share = part / whole
    return share if int(whole * share) == part else math.nextafter(share, 1.0)
