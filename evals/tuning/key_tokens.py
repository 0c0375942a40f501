"""The objective `key-tokens`: only tokens that need far context count. The untouched model chooses them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...errors import DataError
from ...scaling.lengths import format_length
from ...scaling.rope import Scaler
from ..models.measured import Tokens
from ..protocols.longppl import GAIN, LEAST_KEYS, MOST_LOSS, JudgeCell
from ..protocols.perplexity_cell import places_of
from ..protocols.protocol import Window
from ..runs.result import Run

SHORT_SHARE = 8  # the short context is one in this many of the trained length, as in LongPPL (4k of 32k)

Keys = dict[str, np.ndarray[Any, np.dtype[np.bool_]]]
"""Which of the scored tokens are key tokens, by the place of their window."""


def judge(windows: Sequence[Window], trained_length: int, prefix: Tokens, recipe: dict[str, Any]) -> JudgeCell:
    """The cell in which the untouched model reads the scored tokens of every window within the trained length.

    Once after all the context that the trained length has room for, and once after a short one: in windows of an
    eighth of it, whose second half is scored.

    Args:
        windows: of the target length, with the same number of scored tokens, at most half of the trained length.
        prefix: the tokens before every window.
        recipe: that of its rows, without the contexts.
    """
    short_length = trained_length // SHORT_SHARE
    piece = short_length // 2
    short, full = [], []
    for window in windows:
        end = len(window.ids)
        full.append(_last(window, end, trained_length, end - window.first, prefix))
        for start in range(window.first, end, piece):
            stop = min(start + piece, end)
            short.append(_last(window, stop, short_length, stop - start, prefix))
    return JudgeCell(
        scaler=Scaler(),
        context=trained_length,
        short=tuple(short),
        full=tuple(full),
        recipe=recipe | {"task": "judge", "rope": str(Scaler()), "places": places_of(windows)},
    )


def choose(cell: JudgeCell, windows: Sequence[Window], run: Run) -> Keys:
    """The key tokens of the places that have enough of them, from the measured losses of `cell`.

    Raises:
        DataError: no place has enough.
    """
    masks = dict(zip((w.place for w in windows), np.split(cell.is_key(run), len(windows)), strict=True))
    kept = {place: mask for place, mask in masks.items() if mask.sum() >= LEAST_KEYS}
    if not kept:
        most, scored = max(int(mask.sum()) for mask in masks.values()), len(next(iter(masks.values())))
        raise DataError(
            f"key tokens lose more than {GAIN:g} nats from {format_length(cell.context // SHORT_SHARE)} to "
            f"{format_length(cell.context)} of context, to less than {MOST_LOSS:g}; at each place {LEAST_KEYS} are "
            f"needed, and the text has at most {most} among {scored} tokens: give a text whose tokens depend on far "
            "context, such as code, or use the objective loss"
        )
    return kept


def _last(window: Window, end: int, context: int, scored: int, prefix: Tokens) -> Window:
    """The window of `context` tokens that ends at `end` of another, with its last tokens scored."""
    ids = prefix + window.ids[end - context + len(prefix) : end]
    return Window(ids=ids, first=len(ids) - scored, place=f"{window.place}-{len(window.ids) - end}")
