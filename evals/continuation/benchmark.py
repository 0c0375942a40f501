"""The benchmark of continuation methods: prompts that are cut at arbitrary places, and what each
method writes after the cut.

Each cut is measured with all methods, and its rows are stored as soon as it is done. The fields
are:

    next_byte_bits  bits of the byte after the prompt
    top1            whether that byte is the likeliest one
    finished        whether the likeliest text completes the token that was cut
    bits_per_byte   bits per byte of the next 8 bytes
    extra_forwards  model runs up to the first token past the prompt, minus those of `off`
    extra_ms        time up to that token, minus that of `off`
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console
from rich.progress import track

from ...engine import tensor_parallel
from ...engine.load import load
from ...engine.model import Model
from ...engine.storage import write_atomic
from ...errors import DataError
from ...tokenizer_tools import cuts
from ...tokenizer_tools.cuts import Cut
from ...tokenizer_tools.vocabulary import Vocabulary
from ..data import Text, load_text
from ..models.local import LocalModel
from ..runs.cell import shared_recipe
from ..runs.result import Row, Run
from .methods import HEALING, METHODS, OFF, Ending
from .report import LEGEND, plot_continuation, summarize, tables, to_markdown

_USUAL = (
    ("shakespeare", cuts.ANYWHERE),
    ("code", cuts.ANYWHERE),
    ("shakespeare", cuts.AFTER_SPACE),
    ("code", cuts.INSIDE),
    ("chinese", cuts.INSIDE),
)
_OF_ONE_TEXT = (cuts.ANYWHERE, cuts.AFTER_SPACE, cuts.INSIDE)


@dataclass(frozen=True, kw_only=True)
class CutText:
    """One text with its cuts of one kind."""

    text: Text
    kind: str
    cuts: tuple[Cut, ...]

    @property
    def name(self) -> str:
        """Such as "code, any character"."""
        return f"{Path(self.text.name).name}, {self.kind}"


def draw_all(vocabulary: Vocabulary, text: str | None, count: int, seed: int) -> list[CutText]:
    """Draw cuts of each kind. There are fewer if a text has not enough places of a kind.

    Args:
        text: as for `load_text`. None: English, code and Chinese.
        count: cuts of each kind in each text.
        seed: of the places.

    Raises:
        DataError: a text is too short to cut.
    """
    kinds = _USUAL if text is None else tuple((text, kind) for kind in _OF_ONE_TEXT)
    texts = []
    for name, kind in kinds:
        loaded = load_text(name)
        drawn = cuts.draw(vocabulary, "\n\n".join(loaded.documents), kind, count, seed)
        texts.append(CutText(text=loaded, kind=kind, cuts=tuple(drawn)))
    return texts


AHEAD = 8
"""Number of bytes after the prompt whose probability is measured."""


def measure_all(model: Model, texts: Sequence[CutText], run: Run, seed: int, console: Console) -> list[Row]:
    """Measure every cut that is not in `run` yet, with a progress bar. Returns the rows of all
    cuts."""
    all_rows: list[Row] = []
    local = LocalModel(model)
    todo = [(text, cut) for text in texts for cut in text.cuts]
    for text, cut in track(todo, "cuts", console=console):
        recipes = {method: _recipe(local, text, cut, seed) | {"method": method} for method in METHODS}
        rows = [run.find(recipe) for recipe in recipes.values()]
        if None in rows:
            measured = measure(model, cut)
            rows = [run.add(recipe, measured[method]) for method, recipe in recipes.items()]
        all_rows += [row for row in rows if row is not None]
    return all_rows


def _recipe(model: LocalModel, text: CutText, cut: Cut, seed: int) -> dict[str, Any]:
    return shared_recipe(model, text.text) | {
        "task": "continuation",
        "rope": str(model.rope),
        "kind": text.kind,
        "place": cut.place,
        "seed": seed,
        "transformers": transformers.__version__,
    }


def measure(model: Model, cut: Cut) -> dict[str, dict[str, Any]]:
    """The measurements at one cut, by method."""
    rest_of_token = cut.token[cut.overlap :]
    with model.running(len(cut.prompt)) as runner:
        ending = Ending(model, runner, cut.prompt)
        openings = {method: ending.open(method) for method in METHODS if method != HEALING}
        measured: dict[str, dict[str, Any]] = {HEALING: {"finished": ending.transformers_finishes(rest_of_token)}}
        for method, opening in openings.items():
            distribution = ending.distribution(method)
            next_byte = distribution.next_byte_logprobs
            measured[method] = {
                "next_byte_bits": -float(next_byte[cut.rest[0]]) / math.log(2),
                "top1": int(next_byte.argmax()) == cut.rest[0],
                "finished": ending.finishes(opening, rest_of_token),
                "bits_per_byte": -distribution.logprob(cut.rest[:AHEAD]) / math.log(2) / AHEAD,
                "extra_forwards": opening.forwards - openings[OFF].forwards,
                "extra_ms": 1e3 * (opening.seconds - openings[OFF].seconds),
            }
    return measured


def compare(name: str, text: str | None, *, cuts: int, seed: int, loading: dict[str, Any], out: Path) -> None:
    """The command: measure, then print and write the tables and the plot."""
    console = Console()
    model = load(name, **loading)
    tensor_parallel.refuse("continuation")
    texts = draw_all(model.vocabulary, text, cuts, seed)
    for cut_text in texts:
        if len(cut_text.cuts) < cuts:
            console.print(f"{cut_text.name}: {len(cut_text.cuts)} of {cuts} cuts; the text has no more such places")
    run = Run(out)
    run.write_environment()
    summaries = summarize(measure_all(model, texts, run, seed, console))
    if not summaries:
        raise DataError(f"{text} has no place to cut; give a longer text")
    table = run.folder / "table.md"
    write_atomic(table, to_markdown(summaries, model.name).encode())
    files = [table, *plot_continuation(summaries, model.name, run.folder / "continuation")]
    for table_shown in tables(summaries):
        console.print(table_shown)
    console.print(LEGEND)
    for path in files:
        console.print(f"  {path}", highlight=False, soft_wrap=True)
