"""From prompts to answers: one at a time, or several together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers.cache_utils import Cache

from ..errors import ContextOverflow, OutOfMemory, PatchError
from ..scaling.lengths import format_length
from ..scaling.rope import Scaler
from ..tokenizer_tools.cover import shared_length
from .answer import Answer
from .cache import can_rewind, rewind, tokens_read
from .completion import Completion
from .decode import Decoding
from .kv_cache import KVCache
from .memory import CacheLost, restoring
from .prompt import Prompt
from .rotary_site import depends_on_length
from .sampling import SamplingParams

if TYPE_CHECKING:
    from .model import Model

ROWS = 8  # answers that are written together at most: eight share the reading of the weights
_SHARED = 32  # tokens of a common beginning from which on it is worth copying


def check_length(model: Model, tokens: int, params: SamplingParams, cache: Cache | None = None) -> int:
    """Tokens of prompt and answer together.

    Args:
        cache: what holds a part of them already.

    Raises:
        ContextOverflow: they are more than the scaler reaches, or than memory holds.
    """
    total = tokens + params.max_new_tokens
    if total > model.max_length:
        factor = math.ceil(total / model.spec.trained_length)
        raise ContextOverflow(
            f"{tokens} prompt tokens and max_new_tokens {params.max_new_tokens} make {total}, more than the "
            f"{format_length(model.max_length)} that {model.name} reaches with rope {str(model.rope)!r}; set "
            f'model.rope = "yarn:{factor}", shorten the prompt, or load with max_length={total} to go there anyway'
        )
    with model.lock:
        model.prepare(total)  # how much room a token takes depends on the scaler
        model.runner.check_room(total, owned=cache.owned if isinstance(cache, KVCache) else 0)
    return total


def refuse_change(model: Model, rope: Scaler) -> None:
    """Raise PatchError if the scaler is no longer what it was when a text was begun."""
    if model.rope is not rope:
        raise PatchError(
            f"the scaler was changed from {rope} to {model.rope} while a text was being streamed; "
            "finish the stream first, or start it again"
        )


def pieces(
    model: Model,
    prompt: Prompt,
    params: SamplingParams,
    answer: Answer,
    cache: Cache | None = None,
    rope: Scaler | None = None,
) -> Iterator[str]:
    """The text of one answer as it is decided; `answer` is filled meanwhile.

    Args:
        rope: what the model was under when the cache was made ready; None is what it is under now.
    """
    rope = rope or model.rope
    length = check_length(model, len(prompt.ids), params, cache)
    decoding = _decoding(model, prompt, params, cache)
    started = False
    while not answer.done:
        with model.lock, torch.inference_mode(), restoring(decoding.cache):
            refuse_change(model, rope)
            model.prepare(length)  # another request may have run since, and its frequencies are not ours
            if started:
                logits = model.runner.forward(decoding.pending, decoding.cache, logits_to_keep=1)[0]
                token = decoding.draw(logits)
            else:
                token, started = decoding.open(), True
        if piece := answer.push(token):
            yield piece


@dataclass
class _Row:
    index: int
    decoding: Decoding
    answer: Answer


def generate_all(model: Model, prompts: Sequence[Prompt], params: SamplingParams) -> list[Completion]:
    """Answers to several prompts; those under the same scaler, at the same frequencies, are written together.

    Raises:
        OutOfMemory: not even one text at a time fits, or not one more token of those in progress, and their caches
            cannot go back. `finished` holds the answers that were done.
    """
    alike: dict[object, list[int]] = {}
    for index, prompt in enumerate(prompts):
        scaler = model.rope_at(len(prompt.ids) + params.max_new_tokens)
        own = index if depends_on_length(model.sites, scaler) else None  # every text has frequencies of its own
        alike.setdefault((scaler, own), []).append(index)
    found: dict[int, Completion] = {}
    for members in alike.values():
        done: dict[int, Completion] = {}
        try:
            _generate_together(model, [prompts[index] for index in members], params, done)
        except OutOfMemory as error:
            error.finished = found | {members[n]: completion for n, completion in done.items()}
            raise
        found |= {members[n]: completion for n, completion in done.items()}
    return [found[index] for index in range(len(prompts))]


def _generate_together(
    model: Model, prompts: Sequence[Prompt], params: SamplingParams, found: dict[int, Completion]
) -> None:
    """Answers to several prompts into `found`, up to `ROWS` at a time; whoever is finished makes room for the next.

    A row is computed as though it were alone. A beginning that a prompt shares with one in progress is not read again.
    Where memory runs out, the last row waits until another is finished, and is begun anew.
    """
    lengths = [check_length(model, len(prompt.ids), params) for prompt in prompts]
    most = _rows_that_fit(model, lengths)
    waiting = list(enumerate(prompts))[::-1]
    rows: list[_Row] = []
    left: list[_Row] = []  # the last to finish: the next may share its beginning
    with model.lock, torch.inference_mode():
        model.prepare(max(lengths))
        while waiting or rows:
            for row in [row for row in rows if row.answer.done]:
                found[row.index] = row.answer.completion()
                rows.remove(row)
                left = [row] if waiting and most > 1 else []
            while waiting and len(rows) < most:
                try:
                    rows.append(_opened(model, *waiting[-1], params, [*rows, *left]))
                except OutOfMemory:
                    if not rows and not left:
                        raise
                    most, left = max(1, len(rows)), []
                else:
                    waiting.pop()
            running = [row for row in rows if not row.answer.done]
            try:
                _step(model, running)
            except OutOfMemory as error:
                if isinstance(error, CacheLost) or (len(rows) == 1 and not left):
                    raise
                if len(rows) > 1:
                    rows.remove(running[-1])
                    waiting.append((running[-1].index, prompts[running[-1].index]))
                most, left = len(rows), []


def _opened(model: Model, index: int, prompt: Prompt, params: SamplingParams, others: Sequence[_Row]) -> _Row:
    """A row whose prompt is read and whose first token is drawn."""
    decoding = _decoding(model, prompt, params, _beginning(others, prompt))
    row = _Row(index, decoding, Answer(prompt, params, model.vocabulary, model.stop_ids))
    with restoring(decoding.cache):
        row.answer.push(decoding.open())
    return row


def _step(model: Model, rows: Sequence[_Row]) -> None:
    """The next token of every row."""
    if not rows:
        return
    with restoring(*(row.decoding.cache for row in rows)):
        logits = model.runner.step([(row.decoding.pending, row.decoding.cache) for row in rows])
    for row, own in zip(rows, logits, strict=True):
        row.answer.push(row.decoding.draw(own))


def _rows_that_fit(model: Model, lengths: list[int]) -> int:
    """How many rows may be written together, the longest of them too; one is known to fit."""
    longest = sorted(lengths, reverse=True)
    for rows in range(min(ROWS, len(lengths)), 1, -1):
        try:
            model.runner.check_room(*longest[: rows + 1])  # and the last one to finish
        except ContextOverflow:
            continue
        return rows
    return 1


def _decoding(model: Model, prompt: Prompt, params: SamplingParams, cache: Cache | None) -> Decoding:
    weigh = prompt.weigher(model.runner, model.vocabulary, params.repetition_penalty)
    return Decoding(model.runner, prompt.ids, params, model.stop_ids, cache, weigh)


def _beginning(rows: Sequence[_Row], prompt: Prompt) -> Cache | None:
    """A cache that holds what the prompt shares with one that was read, if that is worth it."""
    best, longest = None, _SHARED - 1
    for row in rows:
        if isinstance(row.decoding.cache, KVCache):
            shared = shared_length(row.answer.prompt_ids, prompt.certain[:-1])  # the last token is run again
            if shared > longest:
                best, longest = row.decoding.cache, shared
    if best is None:
        return None
    excess = max(0, tokens_read(best) - longest)
    if not can_rewind(best, excess):
        return None
    cache = best.fork()
    rewind(cache, excess)
    return cache
