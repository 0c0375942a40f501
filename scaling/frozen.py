"""A scaler that follows the length of the text, held still at one length."""

from __future__ import annotations

from .longrope import LongRoPE
from .rope import RopeSpec, Scaler, compose

__all__ = ["follows_length", "frozen"]


def follows_length(scaler: Scaler) -> bool:
    """True if its frequencies depend on the length of the text."""
    return any(part.depends_on_length for part in scaler.parts if part.facet in ("frequencies", "wavelength grid"))


def frozen(scaler: Scaler, rope: RopeSpec, length: int) -> Scaler:
    """`scaler` with the frequencies that it has for a text of `length` tokens, whatever text there is.

    The frequencies become `LongRoPE` factors with their own temperature; position maps and the temperature of queries
    stay as they are. A scaler that does not follow the length is returned as it is.
    """
    if not follows_length(scaler):
        return scaler
    found = scaler.frequencies(rope, length)
    factors = tuple((rope.theta / found.inv_freq).nan_to_num(1.0).tolist())  # 0 / 0: pairs that stand still
    still = LongRoPE(
        factor=max(length / rope.trained_length, 1.0),
        short=factors,
        long=factors,
        attention_factor=found.attention_factor,
    )
    return compose(still, *(part for part in scaler.parts if part.facet in ("positions", "temperature")))
