"""Several tokens at the end of a text: their attention by the kernel with bfloat16 products."""

from __future__ import annotations

import torch
from torch import Tensor

from ..runners.cpu.bfloat16_attention import BandPart, banded_products, first_in_group
from ..runners.cpu.threads import use_threads
from .kernel import AttentionScore
from .paged_rope import PagedRope
from .rotation import Angles


class ChunkProducts:
    """The attention of the last `queries` of `length` tokens of a text. All layers share it.

    Args:
        first: the first key that is given to `attend`; 0 for layers without a window.
    """

    def __init__(self, rope: PagedRope, queries: int, length: int, first: int) -> None:
        self._layout, self._bands = rope.layout, []
        positions = torch.arange(length - queries, length)
        temperature, angles = rope.temperature(positions), rope.query_angles(positions, torch.empty(0))
        self._temperature = None if temperature is None else temperature.float()[:, None]
        for index, band in enumerate(rope.bands):
            lows = band.start(positions).clamp(min=0)
            highs = torch.maximum(band.stop(positions), lows)
            seen = highs > lows
            if not seen.any():
                continue
            shift, shifted = None, 0
            if (shifts := rope.shifts(index, length)) is not None:
                shifted = first_in_group(int(lows[seen].min()))
                shift = Angles(*shifts[shifted : int(highs[seen].max())].unbind(1))
            lows, highs = (x.sub(first).clamp(min=0).int() for x in (lows, highs))
            self._bands.append(BandPart(Angles(*(x[index] for x in angles)), lows, highs, shift, shifted))

    def attend(self, q_HND: Tensor, k_KMD: Tensor, v_KMD: Tensor, score: AttentionScore) -> Tensor:
        """Attention of un-rotated queries over the keys from `first` on, as they are stored: float32 [H, N, D]."""
        bands, layout, temperature = self._bands, self._layout, self._temperature
        return banded_products(q_HND, k_KMD, v_KMD, bands, layout, score, temperature, use_threads())
