"""The scalers that `tune` tries: the closed forms for a target, and those next to a scaler that did
well."""

from __future__ import annotations

import dataclasses
import math

from ...errors import ConfigError
from ...scaling import hf_write
from ...scaling.positions import SelfExtend
from ...scaling.rope import RopeSpec, Scaler, compose
from ...scaling.spec import parse
from ...scaling.temperature import LogN

_STEP = 2**0.25  # between neighbouring factors; windows go by its square, whole numbers by one at least


def starting_points(rope: RopeSpec, target: int) -> list[Scaler]:
    """Every closed form for `target` tokens, in about the order in which they have done well.

    Factors above the ratio N / L, because NTK-aware and its mixed-radix form slow their fast pairs
    so little that they carry less than their factor; windows of L/4 and L/2, as ReRoPE's author has
    them.
    """
    L, s = rope.trained_length, target / rope.trained_length

    def extend(window: int) -> str:
        """Self-Extend with the smallest group that reaches the target."""
        group = math.ceil((target - window) / (L - window))
        while SelfExtend(group=group, window=window).reach(rope) < target:
            group += 1
        return f"self-extend:{group},window={window}"

    def leak(window: int) -> str:
        k = math.ceil(1.02 * (target - window) / (L - window) * 100) / 100  # its reach ends just before the target
        return f"leaky-rerope:{window},k={k:g}"

    specs = [
        f"yarn:{s:g}",
        f"rerope:{L // 2}|logn",
        extend(L // 4),
        "dual-chunk",
        f"ntk-mixed:{s:g}",
        f"ntk:{2 * s:g}",
        "none",
        f"rerope:{L // 4}|logn",
        f"yarn:{s:g}|logn",
        extend(L // 2),
        f"ntk-mixed:{1.5 * s:g}",
        f"yarn:{1.5 * s:g}",
        f"ntk-by-parts:{s:g}",
        f"mrrope:{s:g}",
        f"alpharope:{s:g}",
        f"ntk:{1.5 * s:g}",
        f"{extend(L // 4)}|logn",
        "dual-chunk|logn",
        leak(L // 4),
        f"rerope:{L // 2}",
        f"jet-long:{L // 4}",
        f"ntk-mixed:{s:g}|logn",
        f"ntk:{2 * s:g}|logn",
        f"critical-base:{target}",
        f"base-bound:{target}",
        f"ntk:{s:g}",
        f"ntk-fixed:{s:g}",
        f"ntk-fixed:{1.5 * s:g}",
        f"llama3:{s:g}",
        f"yarn:{2 * s:g}",
        f"linear:{s:g}",
    ]
    return [parse(spec) for spec in specs]


def neighbours(scaler: Scaler) -> list[Scaler]:
    """Scalers that differ from `scaler` in one thing: a number a step up or down, log n there or
    not."""
    scalers = []
    for part in scaler.parts:
        for changed in _varied(part):
            scalers.append(compose(*(changed if other is part else other for other in scaler.parts)))
    rest = [other for other in scaler.parts if other.facet != "temperature"]
    if len(rest) < len(scaler.parts):
        scalers.append(compose(*rest))
    elif rest:
        scalers.append(compose(*rest, LogN()))
    return scalers


def _varied(part: Scaler) -> list[Scaler]:
    """`part` with one number a step up or down."""
    steps: dict[str, float] = {}
    if part.facet == "frequencies":
        steps = {"factor": _STEP}
    elif part.facet == "positions":
        steps = {"window": _STEP**2, "near": _STEP**2, "k": _STEP, "group": _STEP}
    scalers: list[Scaler] = []
    for name, step in steps.items():
        value = getattr(part, name, None)
        if value is None:
            continue
        for target in (value * step, value / step):
            if isinstance(value, int):
                target = max(round(target), value + 1) if target > value else min(round(target), value - 1)
            else:
                target = float(f"{target:.3g}")
            try:
                scalers.append(dataclasses.replace(part, **{name: target}))
            except ConfigError:
                continue  # below what the field allows
    return scalers


def fits_config(scaler: Scaler, rope: RopeSpec) -> bool:
    """True if a Hugging Face config can hold it, so that other engines can serve it unchanged."""
    try:
        hf_write.write(rope, scaler)
    except ConfigError:
        return False
    return True


def simplicity(scaler: Scaler, rope: RopeSpec) -> tuple[int, int]:
    """Sorts the simpler of two scalers first: the untouched model, then what config files name,
    then what they hold as a list of factors, then what needs a patch; and of one kind, that with
    fewer parts."""
    if not scaler.parts:
        return 0, 0
    if not fits_config(scaler, rope):
        return 3, len(scaler.parts)
    carried = hf_write.write(rope, scaler)["rope_type"] == "longrope"
    return 2 if carried else 1, len(scaler.parts)
