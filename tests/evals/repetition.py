"""Accuracy far past the trained length, on text that repeats itself and on text that does not.

The experiment of kexue.fm 9675, 9706 and 9708: a model trained at L reads k L tokens, and the share of tokens that are
its likeliest guess is taken over all of them. If far tokens are seen rightly, repeated text is easy: what comes has
been read before.

    python tests/evals/repetition.py tests/data/tiny-llama --text FOLDER --times 8
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import click
import numpy as np

from ropewalk.engine.model import Model
from ropewalk.evals.data import Text, tokenize_documents
from ropewalk.evals.models.local import LocalModel
from ropewalk.evals.models.measured import Tokens
from ropewalk.evals.statistics import block_interval
from ropewalk.scaling.rope import Scaler

ROPES = (
    "none",
    "linear:8",
    "ntk:8",
    "ntk-fixed:8",
    "ntk-mixed:8",
    "ntk-mixed:8|logn",
    "rerope:0.5x",
    "rerope:0.5x|logn",
)
"""Those of the published table."""


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Share of tokens guessed right, 0 to 1, with its 95% interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.mean:.2f} ({100 * self.low:.1f}-{100 * self.high:.1f})"


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One method.

    Args:
        within: over windows of the trained length.
        repeated, fresh: over windows of several times as many tokens.
    """

    rope: str
    within: Accuracy
    repeated: Accuracy
    fresh: Accuracy


def windows(documents: Sequence[Tokens], length: int, samples: int) -> list[Tokens]:
    """The first `samples` disjoint windows of the documents, one after the other as one text."""
    whole = [token for document in documents for token in document]
    return [whole[start : start + length] for start in range(0, len(whole) - length + 1, length)][:samples]


def accuracy(model: Model, texts: Sequence[Tokens]) -> Accuracy:
    """Of all tokens but the first of each text."""
    measured = LocalModel(model)
    right = []
    for ids in texts:
        guesses = [rows.argmax(-1).cpu().numpy() for rows in measured.logits(ids, 1, lambda past, count: None)]
        right.append(np.concatenate(guesses) == np.array(ids[1:]))
    values = np.concatenate(right).astype(np.float32)
    low, high = block_interval(values)
    return Accuracy(mean=float(values.mean()), low=low, high=high)


def run(model: Model, text: Text, scalers: Sequence[Scaler], *, times: int, samples: int) -> list[Experiment]:
    """Every scaler on the same windows; the model's own scaler is put back."""
    L, before = model.trained_length, model.rope
    documents = tokenize_documents(text, model.tokenizer)
    fresh = windows(documents, times * L, samples)
    if len(fresh) < samples:
        raise click.ClickException(f"{text.name} holds {len(fresh)} windows of {times * L} tokens, not {samples}")
    repeated, within = [ids[:L] * times for ids in fresh], [ids[:L] for ids in fresh]
    found = []
    try:
        for scaler in scalers:
            model.rope = scaler
            short, again, new = (accuracy(model, texts) for texts in (within, repeated, fresh))
            found.append(Experiment(rope=str(scaler), within=short, repeated=again, fresh=new))
    finally:
        model.rope = before
    return found


@click.command()
@click.argument("model")
@click.option("--text", default="stdlib", show_default=True, help="As of `ropewalk ppl`.")
@click.option("--rope", "ropes", multiple=True, help="Scaler; may be repeated.  [default: those of the table]")
@click.option("--times", default=8, show_default=True, type=click.IntRange(min=2))
@click.option("--samples", default=8, show_default=True, type=click.IntRange(min=1))
def main(model: str, text: str, ropes: tuple[str, ...], times: int, samples: int) -> None:
    """Print a Markdown table of accuracies in percent, and a line of JSON."""
    from ropewalk.engine.load import load
    from ropewalk.errors import RopewalkError
    from ropewalk.evals.data import load_text
    from ropewalk.scaling import parse

    try:
        loaded = load(model, dtype="float32", max_length=2**31)
        scalers = [parse(rope, loaded.trained_length) for rope in ropes or ROPES]
        found = run(loaded, load_text(text), scalers, times=times, samples=samples)
    except RopewalkError as error:
        raise click.ClickException(str(error)) from error
    L = loaded.trained_length
    click.echo(f"| method | {L} tokens | {times * L}, repeated | {times * L}, fresh |\n|---|---|---|---|")
    for one in found:
        click.echo(f"| `{one.rope.replace('|', chr(92) + '|')}` | {one.within} | {one.repeated} | {one.fresh} |")
    click.echo(json.dumps([asdict(one) for one in found]))


if __name__ == "__main__":
    main()
