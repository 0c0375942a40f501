"""Perplexity under named protocols.

Perplexity is a protocol, not a number: what is scored, and what each scored token may see. Here

* `fixed-target` scores the same last tokens under every context length, so that only context differs;
* `by-position` scores one long pass in buckets of position, powers of two;
* `sliding` moves a window by a stride and scores the tokens new to it;
* `truncate` scores the first tokens of each document.

A protocol turns tokenised documents into cells, one for each row of the result; measuring a cell is the same for
all of them. Every token is scored once, in float32.
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
from ..errors import ConfigError, DataError, did_you_mean
from ..scaling.lengths import format_length
from ..scaling.rope import Scaler
from .data import Text, tokenize_documents
from .memory import peak_memory_mb
from .result import Row, Run
from .statistics import block_interval

Tokens = list[int]


@dataclass(frozen=True, kw_only=True)
class Window:
    """One forward pass: token ids, and the index of the first one scored (to the end)."""

    ids: Tokens
    first: int
    place: str


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


def fixed_target(
    documents: Sequence[Tokens], context: int, *, target: int, samples: int, longest: int, prefix: Tokens
) -> list[Window]:
    """Windows of `context` tokens that end at the same places for every context up to `longest`.

    Sample k ends at the (k // D + 1) / ceil(samples / D) part of document k mod D, over the D documents that hold
    `longest` tokens. The last `target` tokens of each window are scored.
    """
    if target >= context:
        raise ConfigError(f"target {target} leaves no context within {context} tokens; ask for fewer scored tokens")
    usable = [(n, doc) for n, doc in enumerate(documents) if len(doc) + len(prefix) >= longest]
    if not usable:
        raise _too_short(documents, longest)
    rounds = math.ceil(samples / len(usable))
    windows = []
    for k in range(samples):
        number, doc = usable[k % len(usable)]
        end = max(len(doc) * (k // len(usable) + 1) // rounds, longest - len(prefix))
        ids = prefix + doc[end - context + len(prefix) : end]
        windows.append(Window(ids=ids, first=len(ids) - target, place=f"{number}:{end}"))
    return windows


def from_start(documents: Sequence[Tokens], context: int, *, samples: int, prefix: Tokens) -> list[Window]:
    """The first `context` tokens of the first `samples` documents that hold as many; everything scored."""
    body = context - len(prefix)
    usable = [(n, doc) for n, doc in enumerate(documents) if len(doc) >= body]
    if len(usable) < samples:
        raise _too_short(documents, context, samples)
    return [Window(ids=prefix + doc[:body], first=1, place=f"{n}:{body}") for n, doc in usable[:samples]]


def sliding(
    documents: Sequence[Tokens], context: int, *, stride: int, text_tokens: int, prefix: Tokens
) -> list[Window]:
    """Windows of `context` tokens moved by `stride` over the first `text_tokens` tokens of the text, document by
    document; the first window of a document scores everything, the others their last `stride` tokens."""
    if not 1 <= stride <= context - len(prefix):
        raise ConfigError(f"stride {stride} must be between 1 and the context {context}")
    windows, left = [], text_tokens
    for number, doc in enumerate(documents):
        doc = doc[:left]
        left -= len(doc)
        body, scored_to = context - len(prefix), 0
        for end in range(min(body, len(doc)), len(doc) + stride, stride):
            end = min(end, len(doc))
            ids = prefix + doc[max(0, end - body) : end]
            first = max(len(ids) - (end - scored_to), 1)
            if end > scored_to and first < len(ids):
                windows.append(Window(ids=ids, first=first, place=f"{number}:{end}"))
            scored_to = end
    if not windows:
        raise DataError("the text has fewer than 2 tokens; there is nothing to score")
    return windows


def _too_short(documents: Sequence[Tokens], needed: int, count: int = 1) -> DataError:
    longest = max((len(d) for d in documents), default=0)
    have = sum(len(d) >= needed for d in documents)
    return DataError(
        f"the text is too short: {count} document(s) of {format_length(needed)} tokens needed, {have} there, the "
        f"longest of {longest} tokens; ask for shorter lengths or a longer text"
    )


def position_edges(context: int) -> tuple[int, ...]:
    """Bucket edges 1, 256, 512, 1024, ... up to `context`: tokens at positions in [start, end)."""
    edges = [1]
    while (edge := 128 * 2 ** len(edges)) < context:
        edges.append(edge)
    return (*edges, context)


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


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to measure, before it is tokenised.

    Args:
        protocol: one of PROTOCOLS.
        contexts: window lengths in tokens.
        target: fixed-target only: tokens scored at the end of each window.
        samples: fixed-target: places in the text; by-position and truncate: documents.
        stride: sliding only: tokens by which the window moves.
        text_tokens: sliding only: tokens of the text that are scored.
    """

    protocol: str = "fixed-target"
    contexts: tuple[int, ...]
    target: int = 1024
    samples: int = 1
    stride: int = 256
    text_tokens: int = 32768

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise ConfigError(f"unknown protocol {self.protocol!r}.{did_you_mean(self.protocol, PROTOCOLS)}")
        for name in ("target", "samples", "stride", "text_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} {getattr(self, name)} must be at least 1")
        if not self.contexts or min(self.contexts) < 2:
            raise ConfigError("give at least one context of 2 tokens or more")

    @property
    def settings(self) -> dict[str, int]:
        """The fields that this protocol looks at."""
        return {name: getattr(self, name) for name in PROTOCOLS[self.protocol]}

    def windows(self, documents: Sequence[Tokens], context: int, prefix: Tokens) -> list[Window]:
        """The windows of one context length; `prefix` is what the tokenizer puts before a text."""
        if self.protocol == "fixed-target":
            longest = max(self.contexts)
            return fixed_target(documents, context, longest=longest, prefix=prefix, **self.settings)
        if self.protocol == "sliding":
            return sliding(documents, context, prefix=prefix, **self.settings)
        return from_start(documents, context, prefix=prefix, **self.settings)


PROTOCOLS: dict[str, tuple[str, ...]] = {
    "fixed-target": ("target", "samples"),
    "by-position": ("samples",),
    "sliding": ("stride", "text_tokens"),
    "truncate": ("samples",),
}
"""Protocols, and the fields of `Plan` that each looks at."""


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
        "dtype": str(model.hf.dtype).removeprefix("torch."),
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
