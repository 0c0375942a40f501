"""The report of a run: tables, plots, one HTML file, and the last lines on the screen."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from rich.console import Console
from rich.markdown import Markdown

from ...engine.storage import write_atomic
from ...errors import DataError
from ..data import Text, load_text
from ..protocols.by_name import PROTOCOLS, protocol, settings_of
from ..protocols.longppl import LongPPL
from ..protocols.perplexity_cell import Source, places_of
from ..protocols.protocol import Window, tokens_sha256
from ..retrieval.cells import rebuild
from ..retrieval.score import score_groups
from ..runs import compare
from ..runs.cell import Cell
from ..runs.result import Row, Run, environment_of
from . import style
from .findings import findings, retrieval_findings
from .grid import Grid, Section
from .loss_plots import plot_run
from .retrieval_plots import plot_retrieval
from .sections import loss_section, score_section
from .tables import reach_table, write_tables
from .verdict import verdicts


@dataclass(frozen=True, kw_only=True)
class Passage:
    """A text that the model wrote: after `prompt` it wrote `text`, under the rope spec `rope`."""

    prompt: str
    text: str
    rope: str


_ABOUT = ("model", "text")


def write_report(
    run: Run,
    out: Path,
    *,
    title: str,
    passages: Sequence[Passage] = (),
    plots: Sequence[Path] = (),
) -> Path:
    """Write everything in `run` as one self-contained HTML page without scripts or links; returns
    `out`. It opens with the verdict and the plots.

    Args:
        run: rows of perplexity and of retrieval; env.json is shown if it is there.
        out: the file to write.
        title: the page's heading.
        passages: what the model wrote.
        plots: SVG files, set into the page as they are; a PNG is taken where its SVG is not listed
            too.

    Raises:
        DataError: a plot that is not there or is neither SVG nor PNG.
    """
    verdict, details = verdict_and_findings(run)
    sections = [loss_section(run, group) for group in compare.comparable_groups(run.rows)]
    sections += [score_section(group) for group in score_groups(run.rows)]
    return write_page(
        out,
        title=title,
        subtitle=_subtitle(run.rows),
        verdict=verdict,
        details=details,
        plots=plots,
        reaches=reach_table(run),
        sections=sections,
        passages=passages,
        environment=environment_of(run),
    )


def write_page(
    out: Path,
    *,
    title: str,
    subtitle: str,
    verdict: Sequence[str],
    details: Sequence[str],
    plots: Sequence[Path],
    sections: Sequence[Section],
    environment: dict[str, Any],
    reaches: Grid | None = None,
    passages: Sequence[Passage] = (),
) -> Path:
    """Write a report of these parts to `out`, and return it: the verdict, the plots, then the details."""
    template = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = template.from_string((resources.files(__package__ or "") / "report.html.j2").read_text("utf-8")).render(
        title=title,
        subtitle=subtitle,
        verdict=verdict,
        details=details,
        figures=[_picture(path) for path in plots if path.with_suffix(".svg") not in plots or path.suffix == ".svg"],
        reaches=reaches,
        sections=sections,
        passages=passages,
        environment=environment,
    )
    write_atomic(out, page.encode())
    return out


def _subtitle(rows: Sequence[Row]) -> str:
    models, texts = (
        ", ".join(dict.fromkeys(compare.short(row[name]) for row in rows if row.get(name))) for name in _ABOUT
    )
    if not rows:
        return "Nothing has been measured yet."
    return f"{models} on {texts}" if texts else models


def _picture(path: Path) -> Markup:
    """A plot as markup that stands by itself."""
    if not path.exists():
        raise DataError(f"the plot {path} is not there; draw it before the report")
    name = path.stem.replace("_", " ")
    if path.suffix == ".png":
        data = base64.b64encode(path.read_bytes()).decode()
        return Markup('<img alt="{}" src="data:image/png;base64,{}">').format(name, data)
    if path.suffix != ".svg":
        raise DataError(f"the plot {path} is neither SVG nor PNG")
    return Markup(_inline_svg(path.read_text("utf-8"), name, prefix=f"{path.stem}-"))  # drawn by `style.save`


def _inline_svg(svg: str, name: str, prefix: str) -> str:
    """An SVG of ours for use inside a page: no prolog or metadata, ids of its own, as wide as its
    column, and its four neutral colours left to the page's style sheet."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    head, tag_end, body = svg.partition(">")
    head = re.sub(r' (width|height)="[^"]*"', "", head) + f' role="img" aria-label="{Markup.escape(name)}"'
    body = re.sub(r'(\bid="|href="#|url\(#)', lambda match: match[1] + prefix, body)
    svg = head + tag_end + body
    for variable in ("ink", "muted", "grid", "paper"):
        svg = svg.replace(getattr(style, variable.upper()), f"var(--{variable})")
    return svg


def publish(run: Run, *, title: str, passages: Sequence[Passage] = ()) -> list[Path]:
    """Write tables, plots and report of everything in `run`; returns the files, the report
    first."""
    plots = [*plot_run(run), *plot_retrieval(run)]
    tables = write_tables(run)
    report = write_report(run, run.folder / "report.html", title=title, passages=passages, plots=plots)
    return [report, *tables, *plots]


def verdict_and_findings(run: Run) -> tuple[list[str], list[str]]:
    """The verdict, and the findings behind it, in sentences. Without fixed-target rows the first finding is the
    verdict."""
    sentences = retrieval_findings(run.rows)
    if not sentences or compare.comparable_groups(run.rows):
        sentences = [*findings(run), *sentences]
    verdict = [verdict.text for verdict in verdicts(run)]
    return (verdict, sentences) if verdict else (sentences[:1], sentences[1:])


def print_results(run: Run, files: Sequence[Path], left_out: Sequence[Cell], console: Console) -> None:
    """The verdict, the tables, the findings, what was left out, and where the files are."""
    verdict, details = verdict_and_findings(run)
    console.print()
    for sentence in verdict:
        console.print(sentence, style="bold", highlight=False, markup=False)
    console.print()
    console.print(Markdown((run.folder / "table.md").read_text(encoding="utf-8")))
    console.print()
    for sentence in details:
        console.print(f"• {sentence}", highlight=False, markup=False)
    print_left_out(left_out, console)
    print_files(files, console)


def print_left_out(left_out: Sequence[Cell], console: Console) -> None:
    """What there was no time for, if anything."""
    if left_out:
        cells = ", ".join(f"{cell.scaler} at {cell.label}" for cell in left_out)
        console.print(
            f"\nLeft out for lack of time: {cells}. Run the same command again to measure them.",
            highlight=False,
            markup=False,
        )


def print_files(files: Sequence[Path], console: Console) -> None:
    """Where the files are."""
    console.print("\nFiles:")
    for path in files:
        console.print(f"  {path}", highlight=False, soft_wrap=True, markup=False)


def passages_of(row: Row, rows: Iterable[Row], tokenizer: Any) -> list[str]:
    """What the model read for `row`: one text for each forward pass.

    A trial's prompt is checked by its sha256. Windows are checked by the text's sha256, by where
    they end, and by the sha256 of the scored tokens; not by the last in rows of before it was
    stored, and in those of `longppl`, whose judge chose among the tokens.

    Args:
        rows: of the whole run: the longest context of a run may decide where its windows end.
        tokenizer: the model's.

    Raises:
        DataError: the row has no text, or it would come out otherwise than it was.
    """
    if "suite" in row:
        return [rebuild(row, tokenizer).prompt]
    if row.get("task") != "ppl" or row.get("protocol") not in PROTOCOLS:
        raise DataError(f"a row of task {row.get('task')!r} has no text of its own")
    text = load_text(row["text"])
    if text.sha256 != row["text_sha256"]:
        raise DataError(f"the text {text.name} has sha256 {text.sha256}, the row was measured on {row['text_sha256']}")
    longest = sorted({other["context"] for other in rows if isinstance(other.get("context"), int)})
    for context in (row["context"], *longest):
        try:
            windows = _windows_of_row(row, max(context, row["context"]), text, tokenizer)
        except DataError:
            continue
        if row["places"] in (places := places_of(windows), places.partition(", sha256 ")[0]):  # older rows have no hash
            _check_tokens(row, windows)
            return [tokenizer.decode(ids) for w in windows for ids in (w.ids, w.twin) if ids is not None]
    raise DataError(
        f"the windows of this row ended at {row['places']}, and do not come out so again; take the tokenizer of "
        f"{row['model']}, the versions in env.json and all rows of the run"
    )


def _check_tokens(row: Row, windows: Sequence[Window]) -> None:
    """Raise DataError if the row scored other tokens than these windows would."""
    if row["protocol"] == LongPPL.name or row.get("tokens_sha256") is None:
        return
    start, end = row["bucket_start"] or 0, row["bucket_end"]
    sha256 = tokens_sha256([token for w in windows for token in w.ids[max(w.first, start) : end]])
    if sha256 != row["tokens_sha256"]:
        raise DataError(
            f"the row scored other tokens (sha256 {row['tokens_sha256']}) than come out now ({sha256}); take the "
            f"tokenizer of {row['model']} and the versions in env.json"
        )


def _windows_of_row(row: Row, longest: int, text: Text, tokenizer: Any) -> list[Window]:
    settings = {name: row[name] for name in settings_of(row["protocol"]) if name != "judge"}
    chosen = protocol(row["protocol"], tuple(dict.fromkeys((row["context"], longest))), **settings)
    source = Source.of(text, tokenizer, chosen)
    return chosen.windows(source.documents, row["context"], source.start)
