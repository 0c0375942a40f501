"""Where the tokens of a step are, on the device: the angles of their queries and keys, and the keys that they see.

The host reads nothing back, so that a CUDA graph can hold it. `RotationTable` has the same for the CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ....scaling.band import pair_positions, same
from ...attention.rotation import Layout
from ..rotation_table import RotationTable
from .ops import StepBands

_FEWEST_SHIFTS = 4096  # rows of a new table of shifts


class StepAngles:
    """One group of layers under one scaler.

    Args:
        scale: the factor on the scores of its layers.
        exact: True computes with cosines and sines in float64, False in float32.
    """

    def __init__(self, rotation: RotationTable, scale: float, device: torch.device, *, exact: bool) -> None:
        self._rotation, self._scale, self._device = rotation, scale, device
        self._dtype = torch.float64 if exact else torch.float32
        self._inv_freq = rotation.frequencies.inv_freq.to(device)
        self._shifts: tuple[Tensor | None, ...] = (None,) * len(rotation.bands)

    @property
    def layout(self) -> Layout | None:
        """The places of the rotary pairs; None for layers without rotation."""
        return self._rotation.group.layout

    def reserve(self, positions: int) -> bool:
        """Make the tables of shifts reach `positions` keys. True if that moved them."""
        rotation = self._rotation
        needs = [self.layout is not None and band.key is not rotation.stored for band in rotation.bands]
        held = min((len(table) for table in self._shifts if table is not None), default=0)
        if not any(needs) or held >= positions:
            return False
        count = max(_FEWEST_SHIFTS, 1 << (positions - 1).bit_length())
        keys = torch.arange(count, device=self._device)
        self._shifts = tuple(
            self._cos_sin(rotation.shift(band.key, keys), 1.0) if need else None
            for band, need in zip(rotation.bands, needs, strict=True)
        )
        return True

    def at(self, positions: Tensor) -> tuple[StepBands, Tensor]:
        """What the attention of the tokens at `positions` needs, and the angles of their stored keys [N, 2, half].

        Args:
            positions: int64 [N], on the device.
        """
        rotation, factor = self._rotation, self._rotation.frequencies.attention_factor
        if rotation.mapped:
            queries = torch.stack(
                [self._cos_sin(pair_positions(band.query, positions), factor**2) for band in rotation.bands]
            )
            keys = self._cos_sin(pair_positions(rotation.stored, positions), 1.0)
            starts = torch.stack([band.start(positions).clamp(min=0) for band in rotation.bands], -1)
            stops = torch.stack([band.stop(positions) for band in rotation.bands], -1)
        else:
            keys = self._cos_sin(pair_positions(same, positions), factor)
            queries, window = keys[None], rotation.group.window
            starts = torch.zeros_like(positions) if window is None else (positions + 1 - window).clamp(min=0)
            starts, stops = starts[:, None], positions[:, None] + 1
        scales = torch.full_like(positions, self._scale, dtype=self._dtype)
        if (temperature := rotation.temperature(positions)) is not None:
            scales = scales * temperature.to(self._dtype)
        edges = torch.stack((starts, torch.maximum(starts, stops)), -1).int()
        return StepBands(queries=queries, edges=edges, scales=scales, shifts=self._shifts), keys

    def _cos_sin(self, positions: Tensor, factor: float) -> Tensor:
        """Cosines and sines, times `factor`, [n, 2, half]; without rotation 1 and 0. `positions` is [n, 1 or half]."""
        phases = positions.double() * self._inv_freq
        if self.layout is None:
            phases, factor = torch.zeros_like(phases), 1.0
        return torch.stack((torch.cos(phases) * factor, torch.sin(phases) * factor), 1).to(self._dtype)
