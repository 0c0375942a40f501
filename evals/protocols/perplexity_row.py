"""What `ropewalk.evals.perplexity` gives: a plain value for each row."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from ..runs.result import Losses, Row
from .fixed_target import Repeat
from .harm import Harm
from .longppl import LongPPL
from .perplexity_cell import perplexity
from .protocol import Protocol


@dataclass(frozen=True, kw_only=True)
class PerplexityRow:
    """What a protocol gave under one scaler and context.

    Attributes:
        rope: the scaler, as a spec.
        context: window length in tokens.
        bucket_start, bucket_end: positions of the row, by position only.
        loss: nats per token; `loss_low` and `loss_high` its 95 % interval, None where there are too
            few tokens.
        bits_per_byte: None where no tokenizer is known.
        tokens: scored.
        documents: windows.
        peak_memory_mb: of the process so far, MB.
        losses: nats of every scored token, float32 [tokens].
    """

    protocol: str
    model: str
    text: str
    rope: str
    context: int
    bucket_start: int | None
    bucket_end: int | None
    loss: float
    loss_low: float | None
    loss_high: float | None
    perplexity: float
    bits_per_byte: float | None
    tokens: int
    documents: int
    seconds: float
    tokens_per_second: float
    peak_memory_mb: float
    losses: Losses = field(repr=False, compare=False)

    @classmethod
    def of(cls, row: Row, losses: Losses) -> Self:
        """From a row of a run, where numbers that are not finite are null."""
        kinds = {f.name: f.type for f in dataclasses.fields(cls) if f.name != "losses"}
        values: dict[str, Any] = {
            name: math.nan if row[name] is None and kind == "float" else row[name] for name, kind in kinds.items()
        }
        if row["loss"] is None:
            loss = float(losses.mean(dtype=np.float64))
            values |= {"loss": loss, "perplexity": perplexity(loss)}
        return cls(**values, losses=losses)


@dataclass(frozen=True, kw_only=True)
class LongPPLRow(PerplexityRow):
    """A row of `longppl`: `tokens` keys among `candidates`, chosen by `judge`."""

    judge: str
    candidates: int


@dataclass(frozen=True, kw_only=True)
class RepeatRow(PerplexityRow):
    """A row of `repeat`: `gain` is `fresh_loss` less `loss`, nats, with its paired 95 %
    interval."""

    fresh_loss: float
    gain: float
    gain_low: float | None
    gain_high: float | None


@dataclass(frozen=True, kw_only=True)
class HarmRow(PerplexityRow):
    """A row of `harm`: `kl` in nats, `same_top1` in percent, `difference` is `loss` less
    `base_loss`, nats."""

    base_loss: float
    difference: float
    difference_low: float | None
    difference_high: float | None
    kl: float
    kl_low: float | None
    kl_high: float | None
    same_top1: float


ROWS: dict[type[Protocol], type[PerplexityRow]] = {LongPPL: LongPPLRow, Repeat: RepeatRow, Harm: HarmRow}
"""The kind of row that a protocol gives, where it is not the plain one."""
