"""An answer on the screen while it is written: of one prompt, or over the contexts of some files."""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from ..errors import DataError
from .batch import answer_fields
from .messages import print_json
from .waiting import waiting

if TYPE_CHECKING:
    from ..engine.completion import Completion
    from ..engine.model import Model
    from ..engine.sampling import SamplingParams

_COLORS = ("cyan", "yellow", "green", "magenta", "blue", "red")


def continue_text(model: Model, text: str | bytes | list[int], params: SamplingParams, as_json: bool) -> None:
    """Print the text as it is written, or the answer as JSON; on standard error, how much was read."""
    from ..engine.batch import Batch, generate_tokens
    from ..engine.sequence import Sequence

    prompt = model.read(text, params.continuation)
    length = model.check_length(len(prompt.ids), params)
    with waiting("reading the prompt", len(prompt.certain_ids)) as advance:
        resolved, progress = model.resolved(params), lambda _, count: advance(count)
        sequence = Sequence(prompt, resolved, model.vocabulary, model.stop_ids, progress=progress)
        steps = generate_tokens(Batch(model, [sequence], length))
        pieces = (piece for step in steps for _, piece in step)
        first = next(pieces)
    if as_json:
        with waiting("writing", params.max_new_tokens) as advance:
            for _ in pieces:
                advance(1)
        print_json(
            {"model": model.name, "rope": str(model.rope_at(length)), **answer_fields(model, sequence.completion())}
        )
        return
    _print_piece(first)
    for piece in pieces:
        _print_piece(piece)
    _print_piece("\n")
    _tell_of_time(sequence.completion())


def _tell_of_time(completion: Completion) -> None:
    """Say on standard error that --max-time ended an answer, if it did."""
    from ..engine import tensor_parallel

    if completion.finish_reason == "time" and tensor_parallel.is_first():
        count = len(completion.token_ids)
        click.echo(f"ropewalk: --max-time ended the answer, after {count} of its tokens", err=True)


def _print_piece(piece: str, color: str | None = None) -> None:
    from ..engine import tensor_parallel

    if piece and tensor_parallel.is_first():
        click.secho(piece, fg=color, nl=False)
        sys.stdout.flush()


def answer_over_files(
    model: Model,
    question: str,
    files: tuple[str, ...],
    window: int | None,
    pooling: Literal["entropy", "mean", "max"],
    params: SamplingParams,
    as_json: bool,
) -> None:
    """Print the answer as it is decided; on standard error, which context it relied on. Or print all that as JSON.

    Args:
        window: tokens of the windows that files are split into; None takes every file whole.

    Raises:
        DataError: a file is no text, or has none.
    """
    from ..engine import tensor_parallel
    from ..tokenizer_tools.windows import windows

    contexts, labels = [], []
    for label, text in (labelled for file in files for labelled in _documents(file).items()):
        parts = [text] if window is None else windows(text, model.tokenizer, window, window // 8)
        contexts += parts
        labels += [label if len(parts) == 1 else f"{label}, part {n} of {len(parts)}" for n in range(1, len(parts) + 1)]
    answer = model.over_contexts(question, contexts, pooling, params)
    with waiting("reading the contexts", answer.prompt_tokens) as advance:
        answer.progress = lambda _, count: advance(count)
        pieces = answer.pieces()
        first = next(pieces, "")
    for piece in itertools.chain([first], pieces):
        source = answer.tokens[-1].source if answer.tokens else None  # none if --max-time was over before
        if not as_json and source is not None:
            _print_piece(piece, _COLORS[source % len(_COLORS)])
    counts = Counter(labels[token.source] for token in answer.tokens if token.source is not None)
    if as_json:
        fields = answer_fields(model, answer.completion())
        rope = str(model.rope_at(answer.length))
        print_json({"model": model.name, "rope": rope, **fields, "sources": dict(counts.most_common())})
        return
    _print_piece("\n")
    _tell_of_time(answer.completion())
    if tensor_parallel.is_first():
        for label, count in counts.most_common():
            share = f"{count / len(answer.tokens):>4.0%} of the answer  "
            click.secho(share + label, fg=_COLORS[labels.index(label) % len(_COLORS)], err=True)


def _documents(file: str) -> dict[str, str]:
    """The documents of a file, by their labels."""
    from ..engine.texts import read_documents

    try:
        documents = read_documents(Path(file))
    except OSError as error:
        raise DataError(f"{file} cannot be read as a context: {error.strerror or error}") from error
    if not any(document.strip() for document in documents):
        raise DataError(f"{file} is blank; leave it out")
    if len(documents) == 1:
        return {file: documents[0]}
    return {f"{file}, record {n}": document for n, document in enumerate(documents, 1) if document.strip()}
