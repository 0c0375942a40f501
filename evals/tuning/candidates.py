"""The scalers that `tune` tries, what is measured of each, their ranking, and the outcome."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from statistics import fmean

import numpy as np

from ...engine.tuned_scalers import TunedScaler
from ...errors import ConfigError
from ...scaling import hf_write
from ...scaling.positions import SelfExtend
from ...scaling.rope import RopeSpec, Scaler, compose
from ...scaling.spec import parse
from ...scaling.temperature import LogN
from ...version import __version__
from ..protocols.effective_length import TOLERANCE
from ..runs.compare import Difference
from ..runs.result import Losses
from ..statistics import paired_difference

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


@dataclass(kw_only=True, eq=False)
class Candidate:
    """A scaler, and what has been measured of it so far.

    Attributes:
        skimmed: losses by place, nats, of the skimmed text.
        read: the same of the text read whole.
        harm: loss difference to the untouched model on a short text, nats.
        found: by the depth of each passkey that was hidden at the target length, 1 if it was found.
        name: what it is called where its spec is too long; empty if it is not.
    """

    scaler: Scaler
    skimmed: dict[str, Losses] = field(default_factory=dict)
    read: dict[str, Losses] = field(default_factory=dict)
    harm: Difference | None = None
    found: dict[float, float] = field(default_factory=dict)
    name: str = ""

    @property
    def label(self) -> str:
        """For people: its name, or its spec."""
        return self.name or str(self.scaler)

    @property
    def places(self) -> int:
        """Places at which the text was read whole."""
        return len(self.read)

    @property
    def loss(self) -> float | None:
        """Nats per token over the places read whole; None if there is none."""
        return float(np.concatenate([*self.read.values()]).mean(dtype=np.float64)) if self.read else None

    @property
    def skimmed_loss(self) -> float | None:
        """Nats per token as skimmed at the first place, which all have; None if it was not."""
        return float(next(iter(self.skimmed.values())).mean(dtype=np.float64)) if self.skimmed else None

    @property
    def is_harmless(self) -> bool:
        """The upper bound of the harm is at most `TOLERANCE`, the rule of the effective length."""
        return not self.scaler.parts or (self.harm is not None and self.harm.high <= TOLERANCE)


def ranked(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Best first: by how far they came, and by the loss on the places that those who came as far
    share.

    Only places that every candidate compared has are compared, so that no one gains by an easier
    text.
    """
    return _by_losses(candidates, "read") + by_skimming([c for c in candidates if not c.read])


def by_skimming(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The same of what was skimmed alone; those that were not are left out."""
    return _by_losses(candidates, "skimmed")


def _by_losses(candidates: Sequence[Candidate], kind: str) -> list[Candidate]:
    candidates = [c for c in candidates if getattr(c, kind)]
    counts = sorted({len(getattr(c, kind)) for c in candidates}, reverse=True)
    if len(counts) > 1 and sum(len(getattr(c, kind)) == counts[0] for c in candidates) == 1:
        counts = counts[1:]  # the only one with more places is compared with the next ones on theirs
    order: list[Candidate] = []
    for count in counts:
        group = [c for c in candidates if len(getattr(c, kind)) >= count and c not in order]
        shared = set.intersection(*(set(getattr(c, kind)) for c in group))
        order += sorted(group, key=lambda c: fmean(float(getattr(c, kind)[place].mean()) for place in shared))
    return order


def difference(a: Candidate, b: Candidate) -> Difference | None:
    """Loss of `a` less that of `b` over the places that both read whole, or skimmed if there is
    none; paired."""
    for first, other in ((a.read, b.read), (a.skimmed, b.skimmed)):
        if shared := [place for place in first if place in other]:
            mean, low, high = paired_difference(
                np.concatenate([first[place] for place in shared]), np.concatenate([other[place] for place in shared])
            )
            return Difference(mean=mean, low=low, high=high)
    return None


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """The outcome of `tune`.

    Attributes:
        target: tokens that were to be carried.
        rope: the model's geometry.
        ranking: every candidate measured, best first.
        keep_short: True if a scaler that harms short texts could not win.
        complete: False if the budget ended the search.
    """

    target: int
    rope: RopeSpec
    ranking: tuple[Candidate, ...]
    keep_short: bool
    complete: bool

    @cached_property
    def eligible(self) -> list[Candidate]:
        """Candidates that may win, best first: harmless ones if `keep_short`, and those read whole
        if there are any."""
        eligible = [c for c in self.ranking if c.is_harmless or not self.keep_short]
        return [c for c in eligible if c.read] or eligible

    @cached_property
    def ties(self) -> list[Candidate]:
        """The candidate with the lowest loss, and those that are not distinguishable from it."""
        first, *others = self.eligible
        return [first, *(c for c in others if not self.is_worse(c, first))]

    @staticmethod
    def is_worse(candidate: Candidate, other: Candidate) -> bool:
        """The interval of the paired difference lies above zero; too few tokens for an interval
        tell by the mean."""
        change = difference(candidate, other)
        if change is None:
            return True
        return change.low > 0 if change.has_interval else change.mean > 0

    @cached_property
    def winner(self) -> Candidate:
        """Among the ties, the one that finds most passkeys, then the one with the lowest loss."""
        ties = self.ties
        if any(c.found for c in ties):
            most = max(fmean(c.found.values()) for c in ties if c.found)
            return next(c for c in ties if c.found and fmean(c.found.values()) == most)
        return ties[0]

    @cached_property
    def simplest(self) -> Candidate:
        """The simplest candidate that is not distinguishable from the winner."""
        return min(
            (c for c in self.eligible if c is self.winner or not self.is_worse(c, self.winner)),
            key=lambda c: simplicity(c.scaler, self.rope),
        )

    @cached_property
    def servable(self) -> Candidate | None:
        """The best that a config can hold, so that other engines can serve it; None if no such one
        was measured."""
        return next((c for c in self.eligible if c.scaler.parts and self.fits_config(c)), None)

    def as_stored(self, *, text: str) -> TunedScaler:
        """What `Model.remember` stores.

        Args:
            text: what it was measured on, as `describe` shows it.
        """
        loss = self.winner.loss
        return TunedScaler(
            target=self.target,
            winner=self.winner.scaler,
            simplest=self.simplest.scaler,
            servable=None if self.servable is None else self.servable.scaler,
            loss=loss if loss is not None and math.isfinite(loss) else None,
            text=text,
            date=datetime.now(UTC).date().isoformat(),
            ropewalk=__version__,
        )

    def fits_config(self, candidate: Candidate) -> bool:
        """True if a Hugging Face config can hold it."""
        return fits_config(candidate.scaler, self.rope)
