"""`ropewalk.evals.perplexity`: measure a model from Python. It returns rows (`PerplexityRow`)."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import operator
import reprlib
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from transformers import PreTrainedModel

from ..engine.model import Model
from ..engine.patches.patch import patched_with
from ..errors import ConfigError
from ..scaling.lengths import parse_length
from ..scaling.rope import Scaler
from ..scaling.spec import parse
from .data import Text, load_text
from .models.local import LocalModel
from .models.measured import FunctionModel, Logits, MeasuredModel, Start
from .protocols.by_name import protocol as named_protocol
from .protocols.fixed_target import Repeat
from .protocols.harm import Harm
from .protocols.longppl import LongPPL
from .protocols.perplexity_cell import PerplexityCell, Source, perplexity_of, plan
from .protocols.protocol import Protocol
from .runs.result import Losses, Row, Run


@dataclass(frozen=True, kw_only=True)
class PerplexityRow:
    """The result of a protocol under one scaler and context.

    Attributes:
        rope: the scaler as a spec.
        context: window length in tokens.
        bucket_start, bucket_end: positions of the row; only for by-position.
        loss: nats per token. `loss_low` and `loss_high` are its 95 % interval; None if there are
            too few tokens.
        bits_per_byte: None if no tokenizer is known.
        tokens: number of scored tokens.
        documents: number of windows.
        peak_memory_mb: peak memory of the process so far, MB.
        losses: nats of every scored token, float32 [tokens].
    """

    protocol: str
    model: str
    text: str
    rope: str
    context: int
    bucket_start: int | None
    bucket_end: int | None
    loss: float
    loss_low: float | None
    loss_high: float | None
    perplexity: float
    bits_per_byte: float | None
    tokens: int
    documents: int
    seconds: float
    tokens_per_second: float
    peak_memory_mb: float
    losses: Losses = field(repr=False, compare=False)

    @classmethod
    def of(cls, row: Row, losses: Losses) -> Self:
        """Make it from a row of a run. There, numbers that are not finite are null."""
        kinds = {f.name: f.type for f in dataclasses.fields(cls) if f.name != "losses"}
        values: dict[str, Any] = {
            name: math.nan if row[name] is None and kind == "float" else row[name] for name, kind in kinds.items()
        }
        if row["loss"] is None:
            loss = float(losses.mean(dtype=np.float64))
            values |= {"loss": loss, "perplexity": perplexity_of(loss)}
        return cls(**values, losses=losses)


@dataclass(frozen=True, kw_only=True)
class LongPPLRow(PerplexityRow):
    """A row of `longppl`. `tokens` is the number of key tokens that `judge` chose among
    `candidates` tokens."""

    judge: str
    candidates: int


@dataclass(frozen=True, kw_only=True)
class RepeatRow(PerplexityRow):
    """A row of `repeat`. `gain` is `fresh_loss` minus `loss`, nats, with its paired 95 % interval."""

    fresh_loss: float
    gain: float
    gain_low: float | None
    gain_high: float | None


@dataclass(frozen=True, kw_only=True)
class HarmRow(PerplexityRow):
    """A row of `harm`. `kl` is in nats, `same_top1` in percent; `difference` is `loss` minus
    `base_loss`, nats."""

    base_loss: float
    difference: float
    difference_low: float | None
    difference_high: float | None
    kl: float
    kl_low: float | None
    kl_high: float | None
    same_top1: float


ROWS: dict[type[Protocol], type[PerplexityRow]] = {LongPPL: LongPPLRow, Repeat: RepeatRow, Harm: HarmRow}
"""The row classes of the protocols that have additional fields."""


def perplexity(
    model: Model | PreTrainedModel | Logits,
    text: str | Path | Text | Sequence[Sequence[int]],
    *,
    protocol: str = "fixed-target",
    lengths: Sequence[int | str] | int | str = ("1x",),
    ropes: Sequence[str | Scaler] | str | Scaler | None = None,
    tokenizer: Any = None,
    trained_length: int | None = None,
    **settings: Any,
) -> list[PerplexityRow]:
    """Measure `model` on `text` with a protocol. Returns a row for every scaler and length.

        rows = rw.evals.perplexity(model, "shakespeare", lengths=["1x", "2x"], ropes=["none", "yarn:2"])

    Args:
        model: a ropewalk model, a transformers model, or a function from token ids [n] (a list) to
            logits [n, V] (torch or numpy) of the token after each.
        text: the name of a built-in text, a file or folder, a loaded text, or documents as token
            ids.
        protocol: its name; `ropewalk ppl --help` lists them.
        lengths: one or several contexts in tokens, or as "8k" and "2x" (times the trained length).
        ropes: one or several scalers. None: the current scaler of the model. A function takes none.
        tokenizer: a transformers tokenizer. A transformers model always needs it, a function only
            if `text` is text.
        trained_length: of a function, if the protocol or "2x" needs it.
        settings: of the protocol: target, samples, stride, text_tokens, judge.

    Raises:
        ConfigError: the model, the text, a scaler or a setting does not fit.
        DataError: the text is too short.
    """
    if isinstance(model, Model):
        _check_call(type(model).__name__, tokenizer=tokenizer, trained_length=trained_length)
        return _of_model(model, text, protocol, lengths, ropes, settings)
    if isinstance(model, PreTrainedModel):
        _check_call("a transformers model", trained_length=trained_length)
        if tokenizer is None:
            raise ConfigError("a transformers model needs its tokenizer too: perplexity(..., tokenizer=tokenizer)")
        if (scaler := patched_with(model)) is not None:
            raise ConfigError(f"this model is patched with {scaler}; undo the patch, and give the scaler in `ropes`")
        was_training = {module: module.training for module in model.modules()}
        try:
            wrapped = Model(model.eval(), tokenizer, name=model.name_or_path or type(model).__name__)
            return _of_model(wrapped, text, protocol, lengths, ropes, settings)
        finally:
            for module, training in was_training.items():
                module.training = training
    if not callable(model):
        raise ConfigError(f"{type(model).__name__} is neither a model nor a function from token ids to logits")
    _check_call("a function from tokens to logits", ropes=ropes)
    name = getattr(model, "__name__", type(model).__name__)
    measured = FunctionModel(model, name=name, tokenizer=tokenizer, trained_length=trained_length)
    if protocol == LongPPL.name:
        settings.setdefault("judge", "none")
    chosen = _protocol(protocol, lengths, trained_length, settings)
    return _rows(measured, _source(text, tokenizer, chosen), [Scaler()], chosen)


def _of_model(
    model: Model, text: Any, name: str, lengths: Any, ropes: Any, settings: dict[str, Any]
) -> list[PerplexityRow]:
    """Measure a ropewalk model. Its scaler is restored at the end."""
    before = model.rope
    given = (ropes,) if isinstance(ropes, str) or not isinstance(ropes, Iterable) else ropes
    scalers = [before if rope is None else parse(rope, model.trained_length) for rope in given]
    chosen = _protocol(name, lengths, model.trained_length, settings)
    try:
        return _rows(LocalModel(model), _source(text, model.tokenizer, chosen), scalers, chosen)
    finally:
        model.rope = before


def _rows(
    measured: MeasuredModel, source: Source, scalers: Sequence[Scaler], protocol: Protocol
) -> list[PerplexityRow]:
    results = []
    with tempfile.TemporaryDirectory(prefix="ropewalk-") as folder:
        run = Run(Path(folder))
        for cell in plan(measured, source, scalers, protocol):
            rows = cell.measure(measured.under(cell.scaler), run, lambda past, count: None)
            if isinstance(cell, PerplexityCell):
                kind = ROWS.get(type(protocol), PerplexityRow)
                results += [kind.of(row, losses) for row in rows if (losses := run.losses(row)) is not None]
    return results


def _protocol(name: str, lengths: Any, trained_length: int | None, settings: dict[str, Any]) -> Protocol:
    given = (lengths,) if isinstance(lengths, str) or not isinstance(lengths, Iterable) else lengths
    if settings.get("judge") is not None:
        settings = settings | {"judge": str(parse(settings["judge"], trained_length))}
    return named_protocol(name, [parse_length(length, trained_length) for length in given], **settings)


def _source(text: Any, tokenizer: Any, protocol: Protocol) -> Source:
    if isinstance(text, str | Path):
        text = load_text(text)
    if not isinstance(text, Text):
        documents = _token_ids(text)
        start = Start(prefix=[], token=None) if tokenizer is None else Start.of(tokenizer)
        digest = hashlib.sha256(repr(documents).encode()).hexdigest()
        return Source(documents=documents, start=start, name="token ids", sha256=digest)
    if tokenizer is None:
        raise ConfigError(f"the text {text.name} needs a tokenizer: perplexity(..., tokenizer=...), or give token ids")
    return Source.of(text, tokenizer, protocol)


def _token_ids(documents: Any) -> list[list[int]]:
    try:
        return [list(map(operator.index, document)) for document in documents]
    except TypeError:
        raise ConfigError(
            f"a text is the name of a built-in text, a path, a loaded text, or documents as lists of token ids, not "
            f"{reprlib.repr(documents)}"
        ) from None


def _check_call(what: str, **arguments: Any) -> None:
    """Raise ConfigError for an argument that has no effect."""
    for name, value in arguments.items():
        if value is not None:
            raise ConfigError(f"{name} has no effect on {what}; leave it out")
