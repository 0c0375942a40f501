"""An answer over the contexts of some files, in colours."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Literal

import click

from ...errors import DataError
from ...tokenizer_tools.windows import windows
from .. import tensor_parallel
from ..model import Model
from ..sampling import SamplingParams
from ..texts import read_documents

_COLORS = ("cyan", "yellow", "green", "magenta", "blue", "red")


def answer_over_files(
    model: Model,
    question: str,
    files: tuple[str, ...],
    window: int | None,
    pooling: Literal["entropy", "mean", "max"],
    params: SamplingParams,
) -> None:
    """Print the answer as it is decided; on standard error, which context it relied on.

    Args:
        window: tokens of the windows that files are split into; None takes every file whole.

    Raises:
        DataError: a file is no text, or has none.
    """
    contexts, labels = [], []
    for label, text in (labelled for file in files for labelled in _documents(file).items()):
        parts = [text] if window is None else windows(text, model.tokenizer, window, window // 8)
        contexts += parts
        labels += [label if len(parts) == 1 else f"{label}, part {n} of {len(parts)}" for n in range(1, len(parts) + 1)]
    answer = model.over_contexts(question, contexts, pooling, params)
    shown = tensor_parallel.is_first()
    for piece in answer.pieces():
        source = answer.tokens[-1].source
        if shown and source is not None:
            click.secho(piece, fg=_COLORS[source % len(_COLORS)], nl=False)
            sys.stdout.flush()
    if not shown:
        return
    click.echo()
    counts = Counter(token.source for token in answer.tokens)
    for source, count in counts.most_common():
        assert source is not None
        share = f"{count / len(answer.tokens):>4.0%} of the answer  "
        click.secho(share + labels[source], fg=_COLORS[source % len(_COLORS)], err=True)


def _documents(file: str) -> dict[str, str]:
    """The documents of a file, by their labels."""
    try:
        documents = read_documents(Path(file))
    except OSError as error:
        raise DataError(f"{file} cannot be read as a context: {error.strerror or error}") from error
    if not any(document.strip() for document in documents):
        raise DataError(f"{file} is blank; leave it out")
    if len(documents) == 1:
        return {file: documents[0]}
    return {f"{file}, record {n}": document for n, document in enumerate(documents, 1) if document.strip()}
