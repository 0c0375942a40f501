"""Skimming: runs a sample of a long text's tokens, at their own positions, and gives them the weight of all tokens.

A full forward pass over N tokens costs N^2. To compare scalers, it is enough to read the whole end of the text, and
short, evenly spaced stretches of the rest. Every distance up to N occurs. A far key has the weight of all tokens that
were left out around it: the logarithm of their number is added to its score. So a softmax meets as much weight of far
keys as in the full text. Skipped positions come from PoSE (arXiv 2309.10400), which uses them in training. The weights
are ours.

The loss differs from that of the full text, because the model reads fewer words. The order of scalers is nearly the
same (docs/tune.md has the measurement).

Shape suffixes: N tokens read, H query heads, K key-value heads, D head dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import ConfigError
from ...scaling.band import pair_positions, same
from ..attention.kernel import AttentionScore
from ..attention.rotation import Angles, angles
from .rotation_table import RotationTable

_SINKS = 4  # first tokens of a text, the attention sinks of most models; each has the weight of one token
_ROWS = 256  # queries whose scores are computed at a time


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A sample of the tokens of a text.

    Attributes:
        positions: their positions, increasing, int64 [N].
        log_weights: ln of each token's weight for queries of other stretches, float32 [N].
        stretches: the index of each token's stretch, int64 [N].
    """

    positions: Tensor
    log_weights: Tensor
    stretches: Tensor

    @classmethod
    def of(cls, length: int, *, local: int, far: int, stretch: int) -> Sample:
        """The last `local` of `length` tokens, and about `far` of those before, in stretches of `stretch` tokens.

        Raises:
            ConfigError: the text has too few tokens.
        """
        rest, count = length - local, max(1, far // stretch)
        if local < 1 or stretch <= _SINKS or rest < count * stretch:
            raise ConfigError(
                f"{count} stretches of {stretch} tokens (each over {_SINKS}) and the last {local} tokens do not fit "
                f"into {length} tokens; take fewer or shorter stretches"
            )
        starts = torch.linspace(0, rest - stretch, count).round().long() if count > 1 else torch.tensor([0])
        parts = [torch.arange(stretch) + start for start in starts]
        positions = torch.cat([*parts, torch.arange(rest, length)])
        stretches = torch.cat([torch.arange(count).repeat_interleave(stretch), torch.full((local,), count)])
        weights = torch.full((len(positions),), math.log((rest - _SINKS) / (count * stretch - _SINKS)))
        weights[:_SINKS] = 0
        return cls(positions=positions, log_weights=weights, stretches=stretches)


class SkimAttention:
    """Attention of a sample in one group of layers, and the values that these layers share.

    Args:
        device: of the queries, keys and values.
    """

    def __init__(self, rotation: RotationTable, sample: Sample, device: torch.device) -> None:
        self._rotation = rotation
        positions = sample.positions
        bands = rotation.bands if rotation.mapped else None
        self._seen: list[Tensor | None] = [None]  # the keys that every band sees, bool [N, N]
        maps = [(pair_positions(same, positions),) * 2]
        if bands is not None:
            maps = [(pair_positions(band.query, positions), pair_positions(band.key, positions)) for band in bands]
            self._seen = [
                (band.start(positions)[:, None] <= positions) & (positions < band.stop(positions)[:, None])
                for band in bands
            ]
        self._angles = None
        if rotation.group.layout is not None:
            f, like = rotation.frequencies, torch.empty(0, device=device)

            def angles_at(mapped: Tensor) -> Angles:
                return angles(mapped, f.inv_freq, factor=f.attention_factor, like=like)

            self._angles = [(angles_at(query), angles_at(key)) for query, key in maps]
        temperature = rotation.temperature(positions)
        self._temperature = None if temperature is None else temperature.float()[:, None].to(device)
        same_stretch = sample.stretches[:, None] == sample.stretches
        self._bias = torch.where(same_stretch, 0.0, sample.log_weights)
        hidden = positions[:, None] < positions
        if rotation.group.window is not None:
            hidden |= positions[:, None] - positions >= rotation.group.window
        if bands is not None:
            hidden |= ~torch.stack([seen for seen in self._seen if seen is not None]).any(0)
        self._bias[hidden] = -torch.inf
        self._bias = self._bias.to(device)
        self._seen = [None if seen is None else seen.to(device) for seen in self._seen]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, score: AttentionScore) -> Tensor:
        """Attention of un-rotated q [1, H, N, D], k and v [1, K, N, D] -> [1, H, N, D]."""
        layout, group = self._rotation.group.layout, q.shape[1] // k.shape[1]
        q, k, v = q.float(), k.float(), v.float()
        if self._temperature is not None:
            q = q * self._temperature
        rotated = [(q, k)] * len(self._seen)
        if layout is not None:
            assert self._angles is not None
            rotated = [(layout.rotate(q, a), layout.rotate(k, b)) for a, b in self._angles]
        rotated = [(queries, keys.repeat_interleave(group, 1)) for queries, keys in rotated]
        values = v.repeat_interleave(group, 1)
        outs = []
        for start in range(0, q.shape[2], _ROWS):
            rows, columns = slice(start, start + _ROWS), slice(0, start + _ROWS)
            scores = q.new_zeros(())
            for (queries, keys), seen in zip(rotated, self._seen, strict=True):
                part = queries[:, :, rows] @ keys[:, :, columns].transpose(-1, -2)
                scores = part if seen is None else torch.where(seen[rows, columns], part, scores)
            scores = scores * score.scale
            if score.softcap is not None:
                scores = score.softcap * torch.tanh(scores / score.softcap)
            outs.append(torch.softmax(scores + self._bias[rows, columns], -1) @ values[:, :, columns])
        return torch.cat(outs, 2)
