"""`ropewalk generate`: a prompt continued, or answered over the contexts of some files."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from ..errors import DataError
from .options import EXAMPLES, loads_a_model, rope_option

if TYPE_CHECKING:
    from ..engine.model import Model
    from ..engine.sampling import SamplingParams


@click.command(
    epilog=EXAMPLES + '  ropewalk generate smollm2-135m "Once upon a time" --rope auto\n'
    "  cat book.txt | ropewalk generate ./my-model - --max-new-tokens 100 --temperature 0\n"
    '  ropewalk generate smollm2-135m "The captain of the ship is" --window 2k --contexts moby-dick.txt'
)
@click.argument("model")
@click.argument("prompt")
@click.argument("files", nargs=-1, type=click.Path(exists=True, dir_okay=False))
@rope_option(note=" auto is what to take without time to tune.")
@click.option("--max-new-tokens", default=128, show_default=True, help="Most tokens to write.")
@click.option("--temperature", default=0.7, show_default=True, help="0 takes the likeliest token.")
@click.option("--top-p", default=1.0, show_default=True, help="Keep the likeliest tokens that reach this probability.")
@click.option("--top-k", default=0, show_default=True, help="Keep this many likeliest tokens; 0 keeps all.")
@click.option("--seed", type=int, help="Seed that makes sampling repeatable.")
@click.option("--stop", multiple=True, help="End the text before this string; may be repeated.")
@click.option(
    "--continuation",
    type=click.Choice(["auto", "exact", "off"]),
    default="auto",
    show_default=True,
    help="Whether the first token may begin inside PROMPT; off begins one at its end.",
)
@click.option(
    "--contexts",
    "over_contexts",
    is_flag=True,
    help="PROMPT is a question over the FILES that follow, each read by itself (NBCE).",
)
@click.option(
    "--window", help="Split FILES into windows of this many tokens, 2k, say, which overlap by an eighth, at sentences."
)
@click.option(
    "--pooling",
    type=click.Choice(["entropy", "mean", "max"]),
    default="entropy",
    show_default=True,
    help="How the answers of contexts become one: that of the least uncertain one, the mean, or the largest.",
)
@click.option(
    "--special-tokens",
    is_flag=True,
    help="Names of special tokens in PROMPT stand for them, as a chat template means it; else they are plain text.",
)
@loads_a_model
@click.option("--max-length", help="Go past the scaler's reach, up to this length.")
def generate(
    model: str,
    prompt: str,
    files: tuple[str, ...],
    rope: str,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    seed: int | None,
    stop: tuple[str, ...],
    continuation: Literal["auto", "exact", "off"],
    over_contexts: bool,
    window: str | None,
    pooling: Literal["entropy", "mean", "max"],
    special_tokens: bool,
    loading: dict[str, Any],
    max_length: str | None,
) -> None:
    """Continue PROMPT with MODEL.

    MODEL is a built-in name, a folder, a .gguf file or a hub id. PROMPT is the text itself, or - to read it from
    standard input. The text is printed as it is written.

    With --contexts, the next token is drawn from one distribution: those after every one of FILES, each with PROMPT
    behind it, are pooled. In a terminal every context has its colour, and so has what it answered. Contexts have no
    order, a span of the answer comes from one of them, and a confident answer from a context that does not tell may
    win.
    """
    from ..engine import tensor_parallel
    from ..engine.load import load
    from ..engine.sampling import SamplingParams
    from ..engine.texts import read_prompt
    from ..scaling.lengths import parse_length

    params = SamplingParams(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        stop=stop,
        continuation=continuation,
    )
    if over_contexts != bool(files):
        raise click.UsageError(
            "--contexts needs the files to ask: --contexts a.txt b.txt"
            if over_contexts
            else f"{files[0]} is a second prompt; put prompts of several words in quotes, and files after --contexts"
        )
    if window and not over_contexts:
        raise click.UsageError("--window splits the files of --contexts, and there are none")
    text = read_prompt(sys.stdin.buffer.read(), "standard input") if prompt == "-" else prompt
    if prompt == "-" and not text:
        raise DataError("standard input is empty; pipe a text into it, or give the prompt itself in the place of -")
    if prompt != "-" and _is_file(prompt):
        click.echo(f"ropewalk: the prompt is the name of a file; to read the file: - < {prompt}", err=True)
    if over_contexts and isinstance(text, bytes):
        raise DataError("standard input ends inside a character; a question over --contexts is a whole text")
    longest = parse_length(max_length) if max_length else None
    loaded = load(model, rope=rope, **loading, max_length=longest, special_tokens=special_tokens)
    if over_contexts:
        assert isinstance(text, str)
        size = parse_length(window, loaded.trained_length) if window else None
        _answer_over_files(loaded, text, files, size, pooling, params)
        return
    shown = tensor_parallel.is_first()
    for piece in loaded.stream(text, params):
        if shown:
            click.echo(piece, nl=False)
            sys.stdout.flush()
    if shown:
        click.echo()


def _is_file(prompt: str) -> bool:
    try:
        return Path(prompt).is_file()
    except OSError:  # longer than a name can be
        return False


_COLORS = ("cyan", "yellow", "green", "magenta", "blue", "red")


def _answer_over_files(
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
    from ..engine import tensor_parallel
    from ..tokenizer_tools.windows import windows

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
