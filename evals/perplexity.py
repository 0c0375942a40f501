"""Perplexity: a plan's windows become cells, one for each row of the result, and cells are measured.

What is scored, and what each scored token may see, is the protocol's business (`protocols`); measuring a cell is the
same for all of them. Every token is scored once, in float32.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from transformers.cache_utils import Cache

from ..engine.api import Model
from ..scaling.rope import Scaler
from .data import Text, tokenize_documents
from .memory import peak_memory_mb
from .protocols import Plan, Tokens, Window, position_edges
from .result import Row, Run
from .statistics import block_interval


@dataclass(frozen=True, kw_only=True)
class Cell:
    """The windows behind one row of the result (or, with `edges`, one row for each bucket of position)."""

    scaler: Scaler
    context: int
    windows: tuple[Window, ...]
    recipe: dict[str, Any]
    edges: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens fed."""
        return sum(len(w.ids) - 1 for w in self.windows)

    def row_recipes(self) -> list[dict[str, Any]]:
        """The recipe of each row."""
        if not self.edges:
            return [{**self.recipe, "bucket_start": None, "bucket_end": None}]
        return [
            {**self.recipe, "bucket_start": start, "bucket_end": end}
            for start, end in zip(self.edges[:-1], self.edges[1:], strict=True)
        ]


def measure(
    model: Model, cell: Cell, run: Run, progress: Callable[[int, int], None] | None = None
) -> tuple[list[Row], Cache]:
    """Measure one cell and store its rows in `run`; returns them, and the cache of its last window."""
    model.rope = cell.scaler
    started = time.perf_counter()
    losses = []
    for window in cell.windows:
        cache = model.new_cache(len(window.ids))
        losses.append(-model.score_ids(window.ids, window.first, progress, cache).numpy())
    seconds = time.perf_counter() - started
    rows = []
    for recipe in cell.row_recipes():
        start, end = recipe["bucket_start"] or 0, recipe["bucket_end"] or cell.context
        chosen, n_bytes = [], 0
        for window, window_losses in zip(cell.windows, losses, strict=True):
            low, high = max(window.first, start), min(len(window.ids), end)
            chosen.append(window_losses[low - window.first : high - window.first])
            n_bytes += len(model.tokenizer.decode(window.ids[low:high]).encode())
        measured = summary(np.concatenate(chosen), n_bytes) | {
            "documents": len(cell.windows),
            "seconds": seconds,
            "tokens_per_second": cell.tokens / seconds,
            "peak_memory_mb": peak_memory_mb(),
        }
        rows.append(run.add(recipe, measured, np.concatenate(chosen)))
    return rows, cache


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


def cells(model: Model, text: Text, scalers: Sequence[Scaler], plan: Plan) -> list[Cell]:
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
        Cell(
            scaler=scaler,
            context=context,
            windows=windows[context],
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


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Arithmetic of a forward pass, for time left: a dense part a token and an attention part a token and key."""

    dense: float
    attention: float

    @classmethod
    def of(cls, model: Model) -> Cost:
        """Operations from the model's shapes."""
        config = model.hf.config.get_text_config()
        embedding = model.hf.get_input_embeddings().weight.numel()
        weights = sum(p.numel() for p in model.hf.parameters()) - embedding
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(dense=2 * weights, attention=4 * config.num_hidden_layers * config.num_attention_heads * head_dim)

    def step(self, past: int, tokens: int) -> float:
        """Operations of `tokens` tokens on top of `past`."""
        return tokens * (self.dense + self.attention * (past + tokens / 2))

    def cell(self, cell: Cell) -> float:
        """Operations of a cell."""
        return sum(self.step(0, len(w.ids) - 1) for w in cell.windows)
