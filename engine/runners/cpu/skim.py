"""Skimming: a long text read at some of its tokens, each at its own position and weighing as much as those left out.

A full reading of N tokens costs as N^2. To compare scalers it is enough to read the end of the text whole and the rest
in short stretches, evenly spaced: every distance up to N occurs, and so does the crowd of far keys that a softmax has
to see past, because a key of another stretch counts for as many tokens as were left out around it (ln of that number
is added to its score). Skipped positions are PoSE's (arXiv 2309.10400), there for training; the weights are ours.

The loss is not that of the full reading, since the model has fewer words to learn from; the order of scalers is, nearly
(docs/tune.md has the measurement).

Shape suffixes: N tokens read, H query heads, K key-value heads, D head dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ....errors import ConfigError
from ...attention.kernel import AttentionScore
from ...attention.rotation import Angles, angles
from .rotation_table import RotationTable

_SINKS = 4  # first tokens of a text, which models attend to whatever they say: they stand for themselves alone
_ROWS = 256  # queries whose scores are held at once


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The tokens of a text that are read.

    Attributes:
        positions: where they stand, increasing, int64 [N].
        log_weights: ln of the tokens that each stands for, to queries of other stretches, float32 [N].
        stretches: the number of the stretch that each is of, int64 [N].
    """

    positions: Tensor
    log_weights: Tensor
    stretches: Tensor

    @classmethod
    def of(cls, length: int, *, local: int, far: int, stretch: int) -> Sample:
        """The last `local` of `length` tokens, and about `far` of those before, in stretches of `stretch`.

        Raises:
            ConfigError: there are not that many tokens.
        """
        rest, count = length - local, max(1, far // stretch)
        if local < 1 or stretch <= _SINKS or rest < count * stretch:
            raise ConfigError(f"{count} stretches of {stretch} tokens and {local} more cannot be had of {length}")
        starts = torch.linspace(0, rest - stretch, count).round().long() if count > 1 else torch.tensor([0])
        parts = [torch.arange(stretch) + start for start in starts]
        positions = torch.cat([*parts, torch.arange(rest, length)])
        stretches = torch.cat([torch.arange(count).repeat_interleave(stretch), torch.full((local,), count)])
        weights = torch.full((len(positions),), math.log((rest - _SINKS) / (count * stretch - _SINKS)))
        weights[:_SINKS] = 0
        return cls(positions=positions, log_weights=weights, stretches=stretches)


class SkimAttention:
    """Attention among the tokens of a sample in one group of layers, with what all its layers share."""

    def __init__(self, rotation: RotationTable, sample: Sample) -> None:
        self._rotation, self._site = rotation, rotation.plan.site
        at = sample.positions
        rope_state = rotation.rope_state[:2]
        bands = self._site.bands(*rope_state) if rotation.mapped else None
        self._seen: list[Tensor | None] = [None]  # which keys every band sees, bool [N, N]
        maps = [(at.double(), at.double())]
        if bands is not None:
            maps = [(band.query(at), band.key(at)) for band in bands]
            self._seen = [(band.start(at)[:, None] <= at) & (at < band.stop(at)[:, None]) for band in bands]
        self._angles = None
        if rotation.group.layout is not None:
            f, like = rotation.frequencies, torch.empty(0)

            def turns_at(positions: Tensor) -> Angles:
                return angles(positions, f.inv_freq, factor=f.attention_factor, like=like)

            self._angles = [(turns_at(query), turns_at(key)) for query, key in maps]
        self._temperature = None
        if rotation.tempered:
            self._temperature = self._site.logit_factor(rotation.plan.scaler, at).float()[:, None]
        own = sample.stretches[:, None] == sample.stretches
        self._bias = torch.where(own, 0.0, sample.log_weights)
        hidden = at[:, None] < at
        if rotation.group.window is not None:
            hidden |= at[:, None] - at >= rotation.group.window
        if bands is not None:
            hidden |= ~torch.stack([one for one in self._seen if one is not None]).any(0)
        self._bias[hidden] = -torch.inf

    def attend(self, q: Tensor, k: Tensor, v: Tensor, score: AttentionScore) -> Tensor:
        """q [1, H, N, D], k and v [1, K, N, D], un-rotated -> [1, H, N, D]."""
        layout, group = self._rotation.group.layout, q.shape[1] // k.shape[1]
        if self._temperature is not None:
            q = q * self._temperature
        rotated = [(q, k)] * len(self._seen)
        if layout is not None:
            assert self._angles is not None
            rotated = [(layout.rotate(q, a), layout.rotate(k, b)) for a, b in self._angles]
        rotated = [(one, other.repeat_interleave(group, 1)) for one, other in rotated]
        values = v.repeat_interleave(group, 1)
        outs = []
        for start in range(0, q.shape[2], _ROWS):
            rows, keys = slice(start, start + _ROWS), slice(0, start + _ROWS)
            scores = q.new_zeros(())
            for (one, other), seen in zip(rotated, self._seen, strict=True):
                part = one[:, :, rows] @ other[:, :, keys].transpose(-1, -2)
                scores = part if seen is None else torch.where(seen[rows, keys], part, scores)
            scores = scores * score.scale
            if score.softcap is not None:
                scores = score.softcap * torch.tanh(scores / score.softcap)
            outs.append(torch.softmax(scores + self._bias[rows, keys], -1) @ values[:, :, keys])
        return torch.cat(outs, 2)
