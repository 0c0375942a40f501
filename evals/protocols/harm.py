"""The harm of a scaler: what it costs on texts that the model reads without it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ...errors import ConfigError
from ...scaling.lengths import format_length
from ...scaling.rope import Scaler
from ..models.measured import Advance, MeasuredModel
from ..runs.result import Losses, Row
from ..statistics import block_interval, paired_difference
from .fixed_target import SamePlaces
from .protocol import ProtocolResult, Window

_ROWS = 64  # tokens whose distributions are compared at a time


@dataclass(frozen=True, kw_only=True)
class Harm(SamePlaces):
    """The scaled model against the untouched model, token by token, at contexts up to the trained
    length.

    The measures are KL(untouched || scaled) of the next-token distributions in nats, the share of
    tokens with the same likeliest next token, and the paired difference of losses.

    Args:
        target: tokens scored at the end of each window. None: all that have a token before them.
    """

    name: ClassVar[str] = "harm"
    passes: ClassVar[int] = 2
    target: int | None = None

    def scored_tokens(self, room: int) -> int:
        return room if self.target is None else self.target

    def check(self, model: MeasuredModel) -> None:
        L = model.trained_length
        if L is None or self.longest > L:
            known = "unknown" if L is None else format_length(L)
            raise ConfigError(
                f"harm compares a scaled model with the untouched one, whose trained length is {known}; the context "
                f"{format_length(self.longest)} is beyond it: give shorter ones"
            )

    def measure(self, model: MeasuredModel, windows: Sequence[Window], advance: Advance) -> ProtocolResult:
        compared = [compare_distributions(model.under(Scaler()), model, window, advance) for window in windows]
        base, scaled, kl, same = (np.concatenate(parts) for parts in zip(*compared, strict=True))
        difference, low, high = paired_difference(scaled, base)
        kl_low, kl_high = block_interval(kl)
        extra = {
            "base_loss": float(base.mean(dtype=np.float64)),
            "difference": difference,
            "difference_low": low,
            "difference_high": high,
            "kl": float(kl.mean(dtype=np.float64)),
            "kl_low": kl_low,
            "kl_high": kl_high,
            "same_top1": 100 * float(same.mean()),
        }
        return ProtocolResult(losses=[part[1] for part in compared], extra=extra)

    @classmethod
    def scored(cls, row: Row) -> str:
        which = "all tokens" if row.get("target") is None else f"the last {row['target']} tokens"
        return f"{which}, against the untouched model at the same context"


Comparisons = tuple[Losses, Losses, Losses, np.ndarray[tuple[int], np.dtype[np.bool_]]]


def compare_distributions(base: MeasuredModel, other: MeasuredModel, window: Window, advance: Advance) -> Comparisons:
    """Losses of both models, KL(base || other), and whether the likeliest token is the same; each
    [scored tokens].

    The models read the window in lock step, each with its own cache, so that only some logits of
    each are in memory.
    """
    parts: list[list[Tensor]] = []
    with torch.inference_mode():
        pairs = (model.logits(window.ids, window.first, advance) for model in (base, other))
        targets, done = torch.tensor(window.ids[window.first :]), 0
        for p, q in zip(*pairs, strict=True):
            for rows in range(0, len(p), _ROWS):
                block = slice(rows, rows + _ROWS)
                block_targets = targets[done : done + _ROWS, None][: len(p) - rows].to(p.device)
                log_p, log_q = p[block].log_softmax(-1), q[block].log_softmax(-1)
                kl = (log_p.exp() * (log_p - log_q)).sum(-1)
                losses = (-distribution.gather(-1, block_targets)[:, 0] for distribution in (log_p, log_q))
                parts.append([*losses, kl, log_p.argmax(-1) == log_q.argmax(-1)])
                done += len(kl)
    first, second, kl, same = (torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True))
    return first, second, kl, same
