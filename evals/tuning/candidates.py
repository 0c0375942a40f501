"""The scalers that `tune` tries, their measurements, the ranking, and the result."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from statistics import fmean
from typing import Literal

import numpy as np

from ...engine.tuned_scalers import TunedScaler
from ...errors import ConfigError
from ...scaling import hf_write
from ...scaling.position_groups import DPE, SelfLogistic
from ...scaling.positions import SelfExtend
from ...scaling.rope import RopeSpec, Scaler, compose
from ...scaling.spec import parse
from ...scaling.temperature import LogN
from ...version import __version__
from ..protocols.effective_length import TOLERANCE
from ..runs.compare import Difference
from ..runs.result import Losses
from ..statistics import paired_difference

Objective = Literal["loss", "key-tokens"]
"""What the readings are ranked by: the loss on all scored tokens, or on those that need far context."""

_STEP = 2**0.25  # ratio of neighbouring factors; for windows it is squared, whole numbers change by at least one


def starting_points(rope: RopeSpec, target: int) -> list[Scaler]:
    """The methods for `target` tokens with their usual parameters, roughly the most successful
    first.

    Some factors are above the ratio N / L, because NTK-aware and its mixed-radix form slow their
    fast pairs so little that they reach less than their factor. Windows are L/4 and L/2, as the
    author of ReRoPE uses them.
    """
    L, s = rope.trained_length, target / rope.trained_length

    def extend(window: int) -> str:
        """Self-Extend with the smallest group that reaches the target."""
        group = math.ceil((target - window) / (L - window))
        while SelfExtend(group=group, window=window).reach(rope) < target:
            group += 1
        return f"self-extend:{group},window={window}"

    def leak(window: int) -> str:
        k = math.ceil(1.02 * (target - window) / (L - window) * 100) / 100  # 2 % beyond the target
        return f"leaky-rerope:{window},k={k:g}"

    def by_pairs(window: int) -> str:
        """DPE with the smallest group for the slow half of the pairs, and half of it for the fast half."""
        group = 2
        while DPE(groups=(max(1, group // 2), group), window=window).reach(rope) < target:
            group += 1
        return f"dpe:{max(1, group // 2)}/{group},window={window}"

    def logistic(window: int) -> str:
        """SELF with the smallest capacity that reaches the target."""
        capacity = 2
        while SelfLogistic(window=window, capacity=capacity).reach(rope) < target:
            capacity += 1
        return f"self-logistic:{window},capacity={capacity}"

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
        f"dprope:{s:g}",
        logistic(L // 4),
        f"yarn:{s:g}|infoscale",
        f"yarn:{s:g}|step-log",
        f"rerope:{L // 2}|infoscale",
    ]
    if rope.dim % 4 == 0:  # DPE's two blocks of pairs are equal
        specs.append(by_pairs(L // 4))
    return [parse(spec) for spec in specs]


def neighbours(scaler: Scaler) -> list[Scaler]:
    """Scalers that differ from `scaler` in one thing: a number one step up or down, or log n added
    or removed."""
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
    """`part` with one number one step up or down."""
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
                continue  # out of the field's range
    return scalers


def fits_config(scaler: Scaler, rope: RopeSpec) -> bool:
    """True if a Hugging Face config can hold the scaler, so that other engines can serve it
    unchanged."""
    try:
        hf_write.write(rope, scaler)
    except ConfigError:
        return False
    return True


def simplicity(scaler: Scaler, rope: RopeSpec) -> tuple[int, int]:
    """Sort key that puts the simpler scaler first.

    The order is: the untouched model, methods that configs name, methods that configs hold as a
    list of factors, methods that need a patch; within each kind, fewer parts first.
    """
    if not scaler.parts:
        return 0, 0
    if not fits_config(scaler, rope):
        return 3, len(scaler.parts)
    carried = hf_write.write(rope, scaler)["rope_type"] == "longrope"
    return 2 if carried else 1, len(scaler.parts)


@dataclass(kw_only=True, eq=False)
class Candidate:
    """A scaler and its measurements so far.

    Attributes:
        skimmed: losses by place, nats, when the text was skimmed.
        read: losses by place, nats, when the text was read whole.
        harm: loss difference to the untouched model on a short text, nats.
        passkeys: 1 if the passkey was found, else 0, by its depth in a prompt of the target length.
        name: a short name if the spec is too long; else empty.
    """

    scaler: Scaler
    skimmed: dict[str, Losses] = field(default_factory=dict)
    read: dict[str, Losses] = field(default_factory=dict)
    harm: Difference | None = None
    passkeys: dict[float, float] = field(default_factory=dict)
    name: str = ""

    @property
    def label(self) -> str:
        """Its name or its spec, for display."""
        return self.name or str(self.scaler)

    @property
    def places(self) -> int:
        """The number of places at which the text was read whole."""
        return len(self.read)

    @property
    def loss(self) -> float | None:
        """Nats per token over the places that were read whole; None if there are none."""
        return float(np.concatenate([*self.read.values()]).mean(dtype=np.float64)) if self.read else None

    @property
    def skimmed_loss(self) -> float | None:
        """Nats per token, skimmed at the first place, which is the same for all; None if it was not
        skimmed."""
        return float(next(iter(self.skimmed.values())).mean(dtype=np.float64)) if self.skimmed else None

    @property
    def is_harmless(self) -> bool:
        """True if the upper bound of the harm is at most `TOLERANCE`, as for the effective length."""
        return not self.scaler.parts or (self.harm is not None and self.harm.high <= TOLERANCE)


def ranked(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Best first: first by the number of places, then by the loss on the places that the candidates
    share.

    Only shared places are compared, so that no candidate gains from an easier text.
    """
    return _by_losses(candidates, "read") + by_skimming([c for c in candidates if not c.read])


def by_skimming(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The same ranking by skimmed losses. Candidates that were not skimmed are left out."""
    return _by_losses(candidates, "skimmed")


def _by_losses(candidates: Sequence[Candidate], kind: str) -> list[Candidate]:
    candidates = [c for c in candidates if getattr(c, kind)]
    counts = sorted({len(getattr(c, kind)) for c in candidates}, reverse=True)
    if len(counts) > 1 and sum(len(getattr(c, kind)) == counts[0] for c in candidates) == 1:
        counts = counts[1:]  # a single one with more places is compared with the next group on its places
    order: list[Candidate] = []
    for count in counts:
        group = [c for c in candidates if len(getattr(c, kind)) >= count and c not in order]
        shared = [place for place in getattr(group[0], kind) if all(place in getattr(c, kind) for c in group)]
        order += sorted(group, key=lambda c: _finite_or_worst(_joined(getattr(c, kind), shared)))
    return order


def _finite_or_worst(losses: Losses) -> float:
    """The mean in nats; infinite if it is NaN, which would sort anywhere."""
    mean = float(losses.mean(dtype=np.float64))
    return math.inf if math.isnan(mean) else mean


def difference(a: Candidate, b: Candidate) -> Difference | None:
    """Loss of `a` minus loss of `b`, paired, over the places that both read whole, or else over
    those both skimmed."""
    for first, other in ((a.read, b.read), (a.skimmed, b.skimmed)):
        if shared := [place for place in first if place in other]:
            mean, low, high = paired_difference(_joined(first, shared), _joined(other, shared))
            return Difference(mean=mean, low=low, high=high)
    return None


def _joined(losses: dict[str, Losses], places: Sequence[str]) -> Losses:
    return np.concatenate([losses[place] for place in places])


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """The result of `tune`.

    Attributes:
        target: the length in tokens that was asked for.
        rope: the model's rotary geometry.
        ranking: every measured candidate, best first.
        keep_short: True if a scaler that harms short texts cannot win.
        complete: False if the budget ended the search.
        objective: what the readings are ranked by.
    """

    target: int
    rope: RopeSpec
    ranking: tuple[Candidate, ...]
    keep_short: bool
    complete: bool
    objective: Objective = "loss"

    @cached_property
    def eligible(self) -> list[Candidate]:
        """Candidates that may win, best first: with `keep_short` only harmless ones, and if any
        were read whole, only those."""
        eligible = [c for c in self.ranking if c.is_harmless or not self.keep_short]
        return [c for c in eligible if c.read] or eligible

    @cached_property
    def ties(self) -> list[Candidate]:
        """The candidate with the lowest loss, and those that are not distinguishable from it."""
        first, *others = self.eligible
        return [first, *(c for c in others if not self.is_worse(c, first))]

    @staticmethod
    def is_worse(candidate: Candidate, other: Candidate) -> bool:
        """True if the interval of the paired difference lies above zero; without an interval the
        mean decides, and NaN is worse."""
        change = difference(candidate, other)
        if change is None:
            return True
        return change.low > 0 if change.has_interval else not change.mean <= 0

    @cached_property
    def winner(self) -> Candidate:
        """The tie that finds most passkeys; among equals, the one with the lowest loss."""
        ties = self.ties
        if any(c.passkeys for c in ties):
            most = max(fmean(c.passkeys.values()) for c in ties if c.passkeys)
            return next(c for c in ties if c.passkeys and fmean(c.passkeys.values()) == most)
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
        """The best candidate that a config can hold, for other engines; None if none was
        measured."""
        return next((c for c in self.eligible if c.scaler.parts and self.fits_config(c)), None)

    def as_stored(self, *, text: str) -> TunedScaler:
        """The form in which `Model.remember` stores it.

        Args:
            text: the text it was measured on, as `describe` shows it.
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
        """True if a Hugging Face config can hold the candidate."""
        return fits_config(candidate.scaler, self.rope)
