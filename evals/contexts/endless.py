"""One pass over an endless text with a bounded cache: the loss by position, compared with
recomputation."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil

from ...engine.cache import cache_bytes
from ...errors import ConfigError, DataError, Setting
from ...scaling.lengths import format_length
from ...scaling.positions import PositionScaler
from ...scaling.rope import Scaler
from ..data import Text, tokenize_documents
from ..models.local import LocalModel
from ..models.measured import Advance, MeasuredModel, Start
from ..protocols.whole_text import position_edges
from ..runs.cell import Cell, shared_recipe
from ..runs.result import Row, Run, loss_text
from ..statistics import block_interval, paired_difference


@dataclass(frozen=True, kw_only=True)
class EndlessCell(Cell):
    """The first `context` tokens of a text in one pass, under a scaler that evicts keys. A row for
    each bucket of position.

    At some positions of every bucket the token is also predicted by recomputation: the untouched
    model reads the window before it from scratch. That costs a window per token. The pass should be
    as good as this.

    Args:
        ids: the text, with the tokens that the tokenizer adds at its start.
        start: number of these tokens. Every recomputed window begins with them too.
        window: tokens of a recomputed window: the last keys that the scaler's query sees. Its sinks
            are not counted.
        places: number of recomputed tokens per bucket.
        recipe: the recipe of its rows without the bucket.
    """

    scaler: Scaler
    context: int
    ids: tuple[int, ...]
    start: int
    window: int
    places: int
    recipe: dict[str, Any]

    @property
    def buckets(self) -> list[tuple[int, int]]:
        """Positions [start, end), in powers of two."""
        return list(itertools.pairwise(position_edges(self.context)))

    @property
    def pass_lengths(self) -> list[int]:
        return [self.window] * (self.context // self.window + self.places * len(self.buckets))

    def row_recipes(self) -> list[dict[str, Any]]:
        return [self.recipe | {"start": start, "end": end} for start, end in self.buckets]

    def measure(self, model: MeasuredModel, run: Run, advance: Advance) -> list[Row]:
        assert isinstance(model, LocalModel)
        ids = list(self.ids)
        process, progress = psutil.Process(), [(0, time.perf_counter(), 0.0)]  # tokens, seconds, MB
        sizes: list[float] = []

        def watch(past: int, count: int) -> None:
            progress.append((past + count, time.perf_counter(), process.memory_info().rss / 1e6))
            sizes.append(cache_bytes(model.cache) / 1e6)
            advance(0, count)  # the number of keys that a token sees does not grow

        losses = model.losses(ids, 1, watch)
        plain, rows = model.under(Scaler()), []
        for recipe in self.row_recipes():
            start, end = recipe["start"], recipe["end"]
            bucket_losses = losses[start - 1 : end - 1]
            at = np.unique(np.linspace(start, end - 1, self.places).astype(int)).tolist()
            recomputed = np.array([self._recomputed(plain, ids, t, advance) for t in at], np.float32)
            streamed = np.array([losses[t - 1] for t in at], np.float32)
            low, high = block_interval(bucket_losses)
            difference, *bounds = paired_difference(streamed, recomputed, block=1)
            inside = [n for n, (tokens, _, _) in enumerate(progress) if start <= tokens <= end]
            inside = inside or [next(n for n, (tokens, _, _) in enumerate(progress) if tokens > end)]
            first, last = progress[max(inside[0] - 1, 0)], progress[inside[-1]]
            rows.append(
                run.add(
                    recipe,
                    {
                        "loss": float(bucket_losses.mean()),
                        "low": low,
                        "high": high,
                        "streamed": float(streamed.mean()),
                        "recomputed": float(recomputed.mean()),
                        "difference": difference,
                        "difference_low": bounds[0],
                        "difference_high": bounds[1],
                        "recomputed_tokens": len(at),
                        "tokens_per_second": (last[0] - first[0]) / (last[1] - first[1]),
                        "cache_mb": max(sizes[n - 1] for n in inside),
                        "resident_mb": max(progress[n][2] for n in inside),
                    },
                )
            )
        return rows

    def _recomputed(self, plain: Any, ids: list[int], at: int, advance: Advance) -> float:
        """The loss of a token after the window before it, which is read from scratch."""
        begin = max(self.start, at - self.window + self.start)
        window = [*ids[: self.start], *ids[begin : at + 1]]
        loss = float(plain.losses(window, len(window) - 1, lambda *_: None)[0])
        advance(0, len(window))
        return loss

    def outcome(self, rows: Sequence[Row]) -> str:
        first, last = rows[0], rows[-1]
        return f"{loss_text(last, 3)} at the end, cache {first['cache_mb']:.3g} to {last['cache_mb']:.3g} MB"


def cells(
    model: LocalModel, text: Text, scalers: Sequence[Scaler], *, contexts: Sequence[int], places: int
) -> list[EndlessCell]:
    """A cell for every scaler and length.

    Raises:
        ConfigError: a scaler evicts no keys, or cannot work on this model.
        DataError: the text is too short.
    """
    planned = []
    documents = tokenize_documents(text, model.tokenizer, limit_tokens=max(contexts))
    prefix = Start.of(model.tokenizer).prefix
    ids = [*prefix, *(token for document in documents for token in document)]
    for scaler in scalers:
        model.under(scaler)  # raises if the scaler cannot work on this model
        map_ = scaler.member("positions")
        if not isinstance(map_, PositionScaler) or map_.sink_window is None:
            raise ConfigError(f"{scaler} sees every key, so its cache has no bound; use one such as sink-window:1k")
        for context in contexts:
            if len(ids) < context:
                raise DataError(
                    f"{text.name} has {format_length(len(ids))} tokens, and {format_length(context)} are needed; "
                    "give a longer ",
                    Setting("text", form="name"),
                    " or a shorter length",
                )
            planned.append(
                EndlessCell(
                    scaler=scaler,
                    context=context,
                    ids=tuple(ids[:context]),
                    start=len(prefix),
                    window=map_.sink_window[1],
                    places=places,
                    recipe=shared_recipe(model, text)
                    | {
                        "experiment": "endless",
                        "context": context,
                        "places": places,
                        "window": map_.sink_window[1],
                        "rope": str(scaler),
                    },
                )
            )
    return planned
