"""Perplexity: a plan's windows become cells, one for each row of the result, and cells are measured.

What is scored, and what each scored token may see, is the protocol's business (`protocols`); measuring a cell is the
same for all of them. Every token is scored once, in float32.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from transformers.cache_utils import Cache

from ..engine.api import Model
from ..scaling.rope import Scaler
from .cell import Advance, Cell
from .data import Text, tokenize_documents
from .memory import peak_memory_mb
from .protocols import Plan, Tokens, Window, position_edges
from .result import Row, Run
from .statistics import block_interval


@dataclass(frozen=True, kw_only=True)
class PerplexityCell(Cell):
    """The passages behind one row of the result (or, with `edges`, one row for each bucket of position).

    Args:
        then: gets the rows and the cache of the last passage.
    """

    scaler: Scaler
    context: int
    passages: tuple[Window, ...]
    recipe: dict[str, Any]
    edges: tuple[int, ...] = ()
    then: Callable[[PerplexityCell, list[Row], Cache], None] = field(default=lambda *_: None, compare=False)

    @property
    def windows(self) -> list[int]:
        return [len(w.ids) - 1 for w in self.passages]

    def row_recipes(self) -> list[dict[str, Any]]:
        if not self.edges:
            return [{**self.recipe, "bucket_start": None, "bucket_end": None}]
        return [
            {**self.recipe, "bucket_start": start, "bucket_end": end}
            for start, end in zip(self.edges[:-1], self.edges[1:], strict=True)
        ]

    def measure(self, model: Model, run: Run, advance: Advance) -> list[Row]:
        started = time.perf_counter()
        losses = []
        for window in self.passages:
            cache = model.new_cache(len(window.ids))
            losses.append(-model.score_ids(window.ids, window.first, advance, cache).numpy())
        seconds = time.perf_counter() - started
        rows = []
        for recipe in self.row_recipes():
            start, end = recipe["bucket_start"] or 0, recipe["bucket_end"] or self.context
            chosen, n_bytes = [], 0
            for window, window_losses in zip(self.passages, losses, strict=True):
                low, high = max(window.first, start), min(len(window.ids), end)
                chosen.append(window_losses[low - window.first : high - window.first])
                n_bytes += len(model.tokenizer.decode(window.ids[low:high]).encode())
            measured = summary(np.concatenate(chosen), n_bytes) | {
                "documents": len(self.passages),
                "seconds": seconds,
                "tokens_per_second": sum(self.windows) / seconds,
                "peak_memory_mb": peak_memory_mb(),
            }
            rows.append(run.find(recipe) or run.add(recipe, measured, np.concatenate(chosen)))  # some, after a kill
        self.then(self, rows, cache)
        return rows

    def outcome(self, rows: Sequence[Row]) -> str:
        tokens = sum(row["tokens"] for row in rows)
        loss = sum(row["loss"] * row["tokens"] for row in rows) / tokens
        return f"loss {loss:.4f}, {tokens} tokens scored"


def summary(losses: np.ndarray, n_bytes: int) -> dict[str, Any]:
    """What is reported of per-token losses (nats, float32) of a text of `n_bytes` bytes."""
    loss = float(losses.astype(np.float64).mean())
    low, high = block_interval(losses)
    return {
        "tokens": len(losses),
        "loss": loss,
        "loss_low": low,
        "loss_high": high,
        "perplexity": math.exp(loss),
        "bits_per_byte": loss * len(losses) / math.log(2) / max(n_bytes, 1),
    }


def cells(model: Model, text: Text, scalers: Sequence[Scaler], plan: Plan) -> list[PerplexityCell]:
    """The cells of a plan, scaler by scaler; every scaler is checked against the model first.

    Raises:
        DataError: the text is too short for a context.
        ConfigError: a scaler cannot work on this model.
    """
    for scaler in scalers:
        model.rope = scaler
    prefix: Tokens = model.tokenizer("", verbose=False).input_ids
    documents = _documents(model, text, plan)
    shared = {
        "task": "ppl",
        "protocol": plan.protocol,
        "model": model.name,
        "text": text.name,
        "text_sha256": text.sha256,
        "dtype": model.network.precision,
        "device": model.hf.device.type,
        "trained_length": model.trained_length,
        "target": None,
        **plan.settings,
    }
    windows = {context: tuple(plan.windows(documents, context, prefix)) for context in plan.contexts}
    return [
        PerplexityCell(
            scaler=scaler,
            context=context,
            passages=windows[context],
            recipe=shared | {"rope": str(scaler), "context": context, "places": _places(windows[context])},
            edges=position_edges(context) if plan.protocol == "by-position" else (),
        )
        for scaler in scalers
        for context in plan.contexts
    ]


def _documents(model: Model, text: Text, plan: Plan) -> list[Tokens]:
    """The text's documents, tokenised: no more of them, and no more of each, than the plan looks at."""
    longest = max(plan.contexts)
    limit = {"fixed-target": None, "sliding": plan.text_tokens}.get(plan.protocol, longest)
    documents: list[Tokens] = []
    for document in text.documents:
        one = replace(text, documents=(document,))
        documents += tokenize_documents(one, model.tokenizer, limit_tokens=limit)
        if plan.protocol == "sliding":
            enough = sum(map(len, documents)) >= plan.text_tokens
        else:
            enough = sum(len(d) >= longest for d in documents) >= plan.samples
        if enough:
            break
    return documents


def _places(windows: Sequence[Window]) -> str:
    """Where the windows end, `document:token`; many are told by their number and the last."""
    places = [w.place for w in windows]
    return ",".join(places) if len(places) <= 16 else f"{len(places)} windows to {places[-1]}"
