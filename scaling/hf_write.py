"""Scalers written as the `rope_parameters` of a Hugging Face config."""

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
from .yarn import Llama3, NTKByParts, YaRN

__all__ = ["check_frequencies_only", "divisors", "write", "write_served"]

_STANDING_STILL = 1e30
"""Divisor of a pair that does not rotate: finite in float32 and in JSON, no angle at any position."""

_NO_MSCALE = 1e-9
"""An `mscale_all_dim` that changes nothing, where one has to stand beside `mscale`."""


def write(rope: RopeSpec, scaler: Scaler, *, head_dim: int | None = None, as_longrope: bool = False) -> dict[str, Any]:
    """The `rope_parameters` with which stock transformers computes `scaler.frequencies(rope)`.

    Methods that transformers has keep their type; every other static frequency method is carried as
    LongRoPE factors with its own temperature. The config around it needs `max_position_embeddings`: the
    trained length for a dynamic method, any length to be served for the others.

    Args:
        head_dim: the whole head, where only `rope.dim` of it rotates: adds `partial_rotary_factor`, without
            which a family that rotates a part of the head falls back to its own default.
        as_longrope: as LongRoPE factors in any case, for families such as Phi-3 whose configs take no other type.

    Raises:
        ConfigError: the scaler follows the length in a way that transformers does not know, or acts on more
            than the frequencies.
    """
    check_frequencies_only(scaler)
    scaler.check(rope)
    return _finished(rope, head_dim, (None if as_longrope else _native(rope, scaler)) or _carried(rope, scaler))


def write_served(
    rope: RopeSpec,
    scaler: Scaler,
    *,
    head_dim: int | None = None,
    yarn_only: bool = False,
    as_longrope: bool = False,
) -> dict[str, Any]:
    """The `rope_parameters` from which vLLM and SGLang too compute `scaler.frequencies(rope)`.

    Both look for LongRoPE's temperature in `short_mscale` and `long_mscale`, and SGLang ignores the
    `attention_factor` of yarn; so whatever has a temperature of its own is carried as LongRoPE with those keys.

    Args:
        yarn_only: of a model with latent attention, such as DeepSeek-V3: both engines read all of its scalings as yarn
            with `mscale` and `mscale_all_dim`, whatever the rope type says.
        as_longrope: as for `write`.

    Raises:
        ConfigError: the scaler follows the length of the text, which they do not do, or acts on more than the
            frequencies, or is none that they read for a model with latent attention.
    """
    check_frequencies_only(scaler)
    scaler.check(rope)
    if scaler.depends_on_length:
        raise ConfigError(f"'{scaler}' follows the length of the text, which vLLM and SGLang do not do")
    parameters = _native(rope, scaler)
    if yarn_only:
        return _finished(rope, head_dim, _read_as_yarn(scaler, parameters))
    if (
        as_longrope
        or parameters is None
        or parameters.keys() & {"attention_factor", "mscale", "short_factor"}
        or not parameters.get("truncate", True)
    ):
        parameters = _carried(rope, scaler)
        parameters |= dict.fromkeys(("short_mscale", "long_mscale"), parameters["attention_factor"])
    return _finished(rope, head_dim, parameters)


def _read_as_yarn(scaler: Scaler, parameters: dict[str, Any] | None) -> dict[str, Any]:
    """The parameters of a base, or of a yarn without `attention_factor`, which is said by the mscales."""
    fits = parameters is not None and parameters["rope_type"] in ("default", "yarn")
    if parameters is None or not (fits and parameters.get("truncate", True)):
        raise ConfigError(
            f"'{scaler}' cannot be written for vLLM and SGLang: they read every scaling of this model, whose attention "
            "takes a softmax scale from rope_parameters, as the yarn of DeepSeek, with truncated ends; take yarn or "
            "another base"
        )
    if "attention_factor" not in parameters:
        return parameters
    m, slope = parameters.pop("attention_factor"), 0.1 * math.log(parameters["factor"])
    all_dim = parameters.get("mscale_all_dim", _NO_MSCALE)
    mscale = all_dim if m == 1 else (m * (all_dim * slope + 1) - 1) / slope if slope else 0.0
    if mscale <= 0:
        raise ConfigError(
            f"'{scaler}' cannot be written for vLLM and SGLang: they know attention_factor by mscale and "
            f"mscale_all_dim alone for this model, and {m:g} has none above 0; take a larger one"
        )
    return {**parameters, "mscale": mscale, "mscale_all_dim": all_dim}


def _finished(rope: RopeSpec, head_dim: int | None, parameters: dict[str, Any]) -> dict[str, Any]:
    """With the share of the head, and the factor as a number with a point, without which vLLM and SGLang fail."""
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


def divisors(rope: RopeSpec, found: Frequencies) -> Tensor:
    """By what the plain frequencies have to be divided to give `found`, float64 [d/2]; finite for a pair at rest."""
    plain = dataclasses.replace(rope, rotating_pairs=None).theta
    return (plain / found.inv_freq).clamp(max=_STANDING_STILL)


def check_frequencies_only(scaler: Scaler) -> None:
    """Refuse what acts on more than the frequencies.

    Raises:
        ConfigError: names the part that does.
    """
    for part in scaler.parts:
        if part.facet not in ("frequencies", "wavelength grid"):
            raise ConfigError(
                f"{part.name!r} sets the {part.facet}, which no model file holds; patch the model where it runs instead"
            )


def _native(rope: RopeSpec, scaler: Scaler) -> dict[str, Any] | None:
    """The parameters in transformers' own type for the method, or None if it has none."""
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
        return None  # only the proportional type has pairs that stand still
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


def _carried(rope: RopeSpec, scaler: Scaler) -> dict[str, Any]:
    """LongRoPE factors lambda_i = theta_i / theta'_i."""
    host = scaler.member("frequencies") if isinstance(scaler, Composition) else scaler
    if scaler.depends_on_length and not isinstance(host, LongRoPE):
        raise ConfigError(
            f"'{scaler}' follows the length of the text in a way that no rope type of transformers does; "
            "write a static method such as yarn, or patch the model instead"
        )
    within, beyond = (scaler.frequencies(rope, rope.trained_length + more) for more in (0, 1))
    short, long = (divisors(rope, found).tolist() for found in (within, beyond))
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
    """part / whole, such that int(whole * share) is `part` in spite of rounding."""
    share = part / whole
    return share if int(whole * share) == part else math.nextafter(share, 1.0)
