"""A cell of perplexity: the windows of a protocol under one scaler and context, measured on any
model.

The protocol decides which tokens are scored, and what each of them may see. Every token is scored
once, in float32.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ...scaling.rope import Scaler
from ...scaling.spec import parse
from ..data import Text, tokenize_documents
from ..models.measured import Advance, MeasuredModel, Start, Tokens
from ..runs.cell import Cell, rope_recipe, shared_recipe
from ..runs.result import Losses, Row, Run, loss_text
from ..statistics import block_interval
from .longppl import JudgeCell, LongPPL
from .protocol import Protocol, ProtocolResult, Window, tokens_sha256

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PerplexityCell(Cell):
    """The windows of one row of results; for by-position, of one row per bucket.

    Args:
        windows: windows of the text, with one or two forward passes each.
        judge: the cell that chooses the tokens that count. None: all scored tokens count.
        then: called with the cell, its rows and the model.
    """

    scaler: Scaler
    context: int
    protocol: Protocol
    windows: tuple[Window, ...]
    recipe: dict[str, Any]
    judge: JudgeCell | None = None
    then: Callable[[PerplexityCell, list[Row], MeasuredModel], None] = field(default=lambda *_: None, compare=False)

    @property
    def pass_lengths(self) -> list[int]:
        return [len(w.ids) - 1 for w in self.windows for _ in range(self.protocol.passes)]

    def row_recipes(self) -> list[dict[str, Any]]:
        buckets = (bucket or (None, None) for bucket in self.protocol.buckets(self.context))
        return [{**self.recipe, "bucket_start": start, "bucket_end": end} for start, end in buckets]

    def is_ready(self, run: Run) -> bool:
        return self.judge is None or self.judge.is_done(run)

    def measure(self, model: MeasuredModel, run: Run, advance: Advance) -> list[Row]:
        keys = self.judge.keys(run) if self.judge else None
        started = time.perf_counter()
        result = self.protocol.measure(model, self.windows, advance)
        return self.store(model, run, result, time.perf_counter() - started, keys)

    def store(
        self,
        model: MeasuredModel,
        run: Run,
        result: ProtocolResult,
        seconds: float,
        keys: np.ndarray[Any, Any] | None = None,
    ) -> list[Row]:
        """Store the rows of what was measured, and return them.

        Args:
            result: of all windows.
            seconds: of the passes.
            keys: which of the scored tokens count, bool [tokens]; None: all.
        """
        rows = []
        for recipe in self.row_recipes():
            chosen = self._chosen(recipe["bucket_start"] or 0, recipe["bucket_end"] or math.inf, keys)
            losses = np.concatenate(
                [window_losses[mask] for window_losses, mask in zip(result.losses, chosen, strict=True)]
            )
            scored = self._scored(chosen)
            measured = summary(losses, _count_bytes(model, scored)) | {
                "tokens_sha256": tokens_sha256([token for window in scored for token in window]),
                "documents": len(self.windows),
                "seconds": seconds,
                "tokens_per_second": self.protocol.passes * sum(len(w.ids) - 1 for w in self.windows) / seconds,
                "peak_memory_mb": model.memory_mb,
                "run_started": run.started,
            }
            if keys is not None:
                measured["candidates"] = len(keys)
            # after a kill, some rows are already stored
            rows.append(run.find(recipe) or run.add(recipe, _finite_or_reason(measured | result.extra), losses))
        self.then(self, rows, model)
        return rows

    def outcome(self, rows: Sequence[Row]) -> str:
        tokens = sum(row["tokens"] for row in rows)
        lost = [row for row in rows if row["loss"] is None]
        summary_row = lost[0] if lost else {"loss": sum(row["loss"] * row["tokens"] for row in rows) / tokens}
        of = f" of {rows[0]['candidates']}" if "candidates" in rows[0] else ""
        return f"{loss_text(summary_row)}, {tokens}{of} tokens scored"

    def _chosen(self, start: float, end: float, keys: np.ndarray[Any, Any] | None) -> list[np.ndarray[Any, Any]]:
        """Which scored tokens of each window count, bool [scored tokens]."""
        places = [np.arange(w.first, len(w.ids)) for w in self.windows]
        masks = [(place >= start) & (place < end) for place in places]
        if keys is None:
            return masks
        borders = np.cumsum([len(mask) for mask in masks])[:-1]
        return [mask & part for mask, part in zip(masks, np.split(keys, borders), strict=True)]

    def _scored(self, chosen: Sequence[np.ndarray[Any, Any]]) -> list[Tokens]:
        """The ids of the scored tokens of each window that count."""
        return [
            np.array(window.ids[window.first :])[mask].tolist()
            for window, mask in zip(self.windows, chosen, strict=True)
        ]


def _count_bytes(model: MeasuredModel, scored: Sequence[Tokens]) -> int | None:
    counts = [model.count_bytes(ids) for ids in scored]
    return None if None in counts else sum(count or 0 for count in counts)


def _finite_or_reason(measured: dict[str, Any]) -> dict[str, Any]:
    """If a number is not finite, the fields without the loss and with the reason. Bounds of
    intervals may be NaN."""
    for name, value in measured.items():
        if isinstance(value, float) and not math.isfinite(value) and not name.endswith(("_low", "_high")):
            return measured | {"loss": None, "reason": f"{name} is not finite"}
    return measured


def summary(losses: Losses, n_bytes: int | None) -> dict[str, Any]:
    """The fields of a row from per-token losses (nats, float32) of a text of `n_bytes` bytes."""
    loss = float(losses.astype(np.float64).mean())
    low, high = block_interval(losses)
    return {
        "tokens": len(losses),
        "loss": loss,
        "loss_low": low,
        "loss_high": high,
        "perplexity": perplexity_of(loss),
        "bits_per_byte": None if n_bytes is None else loss * len(losses) / math.log(2) / max(n_bytes, 1),
    }


def perplexity_of(loss: float) -> float:
    """exp(loss); infinite if it is too large for a float (above 709 nats)."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


@dataclass(frozen=True, kw_only=True)
class Source:
    """A text as tokens.

    Args:
        documents: token ids without special tokens.
        start: the tokens before a text.
    """

    documents: list[Tokens]
    start: Start
    name: str
    sha256: str

    @classmethod
    def of(cls, text: Text, tokenizer: Any, protocol: Protocol) -> Source:
        """The tokens of a text: only the documents that the protocol reads, and only as much of
        each."""
        documents: list[Tokens] = []
        for document in text.documents:
            single = replace(text, documents=(document,))
            documents += tokenize_documents(single, tokenizer, limit_tokens=protocol.limit)
            if protocol.is_enough(documents):
                break
        return cls(documents=documents, start=Start.of(tokenizer), name=text.name, sha256=text.sha256)


def cells(model: MeasuredModel, text: Text, scalers: Sequence[Scaler], protocol: Protocol) -> list[Cell]:
    """The cells of a protocol on a model, scaler by scaler. Every scaler is first checked against
    the model.

    Raises:
        DataError: the text is too short for a context.
        ConfigError: a scaler or the protocol cannot work on this model.
        ContextOverflow: a context is more than the model can hold.
    """
    return plan(model, Source.of(text, model.tokenizer, protocol), scalers, protocol)


def plan(model: MeasuredModel, source: Source, scalers: Sequence[Scaler], protocol: Protocol) -> list[Cell]:
    """The cells of a protocol on any model; the judge's cell comes first."""
    protocol.check(model)
    scaled = {scaler: model.under(scaler) for scaler in scalers}
    shared = {
        "task": "ppl",
        "protocol": protocol.name,
        **shared_recipe(model, source),
        "target": None,
        **protocol.settings,
    }
    windows = {c: tuple(protocol.windows(source.documents, c, source.start)) for c in protocol.contexts}
    model.check_scoring(max(len(window.ids) for windows_at in windows.values() for window in windows_at))
    samples, available = protocol.settings.get("samples", 0), len(windows[protocol.longest])
    if available < samples:
        _LOG.warning(
            "%s: %s has room for %d of %d samples if no token is scored twice",
            protocol.name,
            source.name,
            available,
            samples,
        )
    judge = None
    if isinstance(protocol, LongPPL):
        judge = _judge(protocol, model, source, shared)
        shared["judge"] = f"{judge.recipe.get('chosen', judge.scaler)} at {protocol.longest}"
    measured = [
        PerplexityCell(
            scaler=scaler,
            context=context,
            protocol=protocol,
            windows=windows[context],
            recipe=shared
            | rope_recipe(scaler, scaled[scaler].rope_at, [w.length or len(w.ids) for w in windows[context]])
            | {"context": context, "places": places_of(windows[context])},
            judge=judge,
        )
        for scaler in scalers
        for context in protocol.contexts
    ]
    return [*([judge] if judge else []), *measured]


def _judge(protocol: LongPPL, model: MeasuredModel, source: Source, shared: dict[str, Any]) -> JudgeCell:
    assert model.trained_length is not None, "the protocol has checked it"
    short, full = (
        tuple(protocol.windows(source.documents, context, source.start))
        for context in (model.trained_length, protocol.longest)
    )
    scaler = parse(protocol.judge)
    recipe = {name: value for name, value in shared.items() if name != "judge"}
    return JudgeCell(
        scaler=scaler,
        context=protocol.longest,
        short=short,
        full=full,
        recipe=recipe
        | rope_recipe(scaler, model.under(scaler).rope_at, (model.trained_length, protocol.longest))
        | {"task": "judge", "places": places_of(full)},
    )


def places_of(windows: Sequence[Window]) -> str:
    """Where the windows end, `document:token`. More than 16 are written as their number, the last
    one, and a hash of all."""
    every = ",".join(w.place for w in windows)
    if len(windows) <= 16:
        return every
    return f"{len(windows)} windows to {windows[-1].place}, sha256 {hashlib.sha256(every.encode()).hexdigest()[:8]}"
