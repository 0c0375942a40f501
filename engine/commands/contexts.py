"""An answer over the contexts of some files, in colours."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Literal

import click

from ...errors import DataError
from ...tokenizer_tools.windows import windows
from .. import split
from ..api import Model
from ..sampling import SamplingParams

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
    for file in files:
        text = _text(file)
        parts = [text] if window is None else windows(text, model.tokenizer, window, window // 8)
        contexts += parts
        labels += [file if len(parts) == 1 else f"{file}, part {n} of {len(parts)}" for n in range(1, len(parts) + 1)]
    answer = model.over_contexts(question, contexts, pooling, params)
    shown = split.is_first()
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


def _text(file: str) -> str:
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as a context: {error}; contexts are text in UTF-8") from error
    if not text.strip():
        raise DataError(f"{file} is blank; leave it out")
    return text
