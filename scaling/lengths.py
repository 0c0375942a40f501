"""Lengths as users write them: `512`, `8k`, `1M` (k = 1024) and `2x` (times the trained length)."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

from ..errors import ConfigError

TrainedLength = int | Callable[[], int] | None
"""The tokens of `1x`: a number, a function that is called only if a spec has a multiple, or None for unknown."""

_UNITS = {"": 1, "k": 1024, "m": 1024**2, "g": 1024**3}
_LENGTH = re.compile(r"(\d{1,99}(?:\.\d{1,99})?)\s*([kKmMgGxX]?)")
_MOST = 2**63 - 1  # positions are int64


def parse_length(text: str | int, trained_length: TrainedLength = None) -> int:
    """The number of tokens that `text` means.

    >>> parse_length("8k"), parse_length("0.25x", trained_length=8192)
    (8192, 2048)

    Raises:
        ConfigError: `text` is not a length, is below 1 or not below 2^63, or is a multiple and the trained length is
            not known.
    """
    match = _LENGTH.fullmatch(str(text).strip())
    if match is None:
        raise ConfigError(f"{text!r} is not a length; write 512, 8k, 1M (k = 1024) or 2x (times the trained length)")
    number, unit = Fraction(match[1]), match[2].lower()  # exact: 0.29x of 100 tokens is 29
    if unit == "x":
        if trained_length is None:
            raise ConfigError(
                f"{text!r} is a multiple of the trained length, which is not known here; write a number of tokens"
            )
        tokens = number * (trained_length() if callable(trained_length) else trained_length)
    else:
        tokens = number * _UNITS[unit]
    if tokens < 1 or tokens.denominator != 1:
        raise ConfigError(f"length {text!r} is {float(tokens):g} tokens; it must be a whole number of at least 1")
    if tokens > _MOST:
        raise ConfigError(f"length {text!r} is {float(tokens):g} tokens; it must be below 2^63")
    return int(tokens)


def format_length(tokens: int) -> str:
    """The shortest way to write `tokens` exactly.

    >>> format_length(8192), format_length(3000), format_length(1536)
    ('8k', '3000', '1.5k')
    """
    for unit in ("m", "k"):
        scale = _UNITS[unit]
        if tokens >= scale and tokens * 4 % scale == 0:
            quarters = {0: "", 1: ".25", 2: ".5", 3: ".75"}[tokens * 4 // scale % 4]
            return f"{tokens // scale}{quarters}{'M' if unit == 'm' else unit}"
    return str(tokens)
