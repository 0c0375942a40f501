"""The report of a run: one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from ..errors import DataError
from ..scaling import format_length
from . import compare, style
from .effective_length import TOLERANCE, is_kept
from .result import Row, Run, write_atomic
from .table import Cell, loss_table


@dataclass(frozen=True, kw_only=True)
class Passage:
    """A text that the model wrote: after `prompt` it wrote `text`, under the rope spec `rope`."""

    prompt: str
    text: str
    rope: str


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A table cell as the template sees it: a main line, small lines below it, a CSS class, a tooltip."""

    main: str
    small: tuple[str, ...] = ()
    css: str = ""
    tip: str = ""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A table as the template sees it; the rows are (method, cells)."""

    title: str
    note: str
    columns: tuple[str, ...]
    rows: list[tuple[str, list[Shown]]] = field(default_factory=list)


PROTOCOLS = {
    "fixed-target": "Windows of every context length end at the same place, and the same last tokens are scored in "
    "all of them. Only the context before those tokens differs, so a difference is the effect of context.",
    "by-position": "One long pass over the text; the loss of every token counts in a bucket of its position. Later "
    "buckets hold other tokens than earlier ones, so compare methods within a bucket.",
    "sliding": "A window moves over the text by a stride, and only the tokens new to it are scored. A token sees at "
    "least the context length less the stride.",
    "truncate": "The first tokens of each document are scored, all of them. Longer contexts score more tokens, so "
    "compare methods at one length, not lengths with each other.",
}


def write_report(
    run: Run,
    out: Path,
    *,
    title: str,
    story: Sequence[str],
    passages: Sequence[Passage] = (),
    plots: Sequence[Path] = (),
) -> Path:
    """Write everything in `run` as one self-contained HTML page without scripts or links; returns `out`.

    Args:
        run: perplexity rows; env.json is shown if it is there.
        out: the file to write.
        title: the page's heading.
        story: sentences at the top; `findings(run)` computes them from the rows.
        passages: what the model wrote.
        plots: SVG files, set into the page as they are; a PNG is taken where its SVG is not listed too.

    Raises:
        DataError: a plot that is not there or is neither SVG nor PNG.
    """
    groups = compare.settings(run.rows)
    template = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = template.from_string((resources.files(__package__ or "") / "report.html.j2").read_text("utf-8")).render(
        title=title,
        subtitle=_subtitle(groups),
        story=story,
        figures=[_picture(path) for path in plots if path.with_suffix(".svg") not in plots or path.suffix == ".svg"],
        settings=[_setting(run, group) for group in groups],
        passages=passages,
        environment=_environment(run),
    )
    write_atomic(out, page.encode())
    return out


def _subtitle(groups: Sequence[Sequence[Row]]) -> str:
    rows = [row for group in groups for row in group]
    models, texts = (", ".join(dict.fromkeys(str(row[name]) for row in rows)) for name in ("model", "text"))
    return f"{models} on {texts}" if rows else "No perplexity rows have been measured yet."


def _setting(run: Run, group: list[Row]) -> dict[str, Any]:
    table = loss_table(group)
    base, delta = compare.reference(group), compare.deltas(run, group)
    trained = format_length(group[0]["trained_length"])

    def grid(title: str, note: str, show: Callable[[Cell], Shown]) -> Grid:
        rows = [(m, [show(c) for c in cells]) for m, cells in zip(table.methods, table.cells, strict=True)]
        return Grid(title=title, note=note, columns=table.columns, rows=rows)

    def show_delta(cell: Cell) -> Shown:
        change = delta.get(cell.row["key"]) if cell.row else None
        if change is None:
            return Shown(main="–", css="none")
        if cell.row is base:
            return Shown(main="0", small=("reference",), css="good")
        if not change.has_interval:
            return Shown(main=_signed(change.mean), small=("no interval",))
        long_enough = cell.row is not None and cell.row["context"] >= cell.row["trained_length"]
        css = "good" if is_kept(change) else "bad" if change.low > TOLERANCE and long_enough else ""
        return Shown(main=_signed(change.mean), small=(_interval(change.low, change.high),), css=css)

    grids = [
        grid(
            "Loss, nats per token",
            "Lower is better; the lowest of each column is bold. 95% intervals below.",
            _loss,
        )
    ]
    if delta:
        note = (
            f"Paired, token by token, with 95% intervals. Green: upper bound at most +{TOLERANCE:g}, the rule of "
            f"the effective length. Red: lower bound above +{TOLERANCE:g}. Below {trained} a model reads less, so "
            "a difference there is not the fault of the method alone."
        )
        grids.append(grid(f"Difference to the untouched model at its trained length ({trained})", note, show_delta))
    note = "Tokens per second of the whole forward pass; seconds and peak memory of the process so far below."
    grids.append(grid("Speed and memory", note, _speed))
    return {"caption": table.caption, "grids": grids, "method": _method(group)}


def _loss(cell: Cell) -> Shown:
    if cell.row is None:
        return Shown(main="not run", small=(cell.reason,) if cell.reason else (), css="none")
    row = cell.row
    tip = f"perplexity {row['perplexity']:.4g}, {row['bits_per_byte']:.3f} bits per byte, {row['tokens']:,} tokens"
    small = (_interval(*cell.interval),) if cell.interval else ()
    return Shown(main=cell.text, small=small, css="best" if cell.is_best else "", tip=tip)


def _speed(cell: Cell) -> Shown:
    if cell.row is None:
        return Shown(main="–", css="none")
    memory = cell.row.get("peak_memory_mb")
    small = (f"{cell.row['seconds']:,.3g} s", f"{memory:,.0f} MB" if memory is not None else "memory unknown")
    return Shown(main=f"{cell.row['tokens_per_second']:,.0f}", small=small)


def _method(group: Sequence[Row]) -> dict[str, str]:
    """How the rows of one setting were measured, by name."""
    row = group[0]
    done = [r for r in group if r.get("loss") is not None]
    tokens, documents = (sorted({r[name] for r in done}) for name in ("tokens", "documents"))
    versions = {json.dumps(r["versions"], sort_keys=True) for r in done if r.get("versions")}
    return {
        "Protocol": f"{row['protocol']}. {PROTOCOLS.get(row['protocol'], '')}".strip(),
        "Scored": f"{_range(tokens)} tokens per cell, from {_range(documents)} document(s) or window(s)",
        "Text": f"{row['text']}, sha256 {row['text_sha256']}",
        "Model": f"{row['model']}, trained length {row['trained_length']:,} tokens, {row['dtype']} on {row['device']}",
        "Intervals": "95%, percentile bootstrap over blocks of 32 consecutive tokens, because neighbouring tokens "
        "are hard or easy together. They cover the choice of tokens within this text, not other texts.",
        **({"Note": "The cells were measured with different versions; see table.csv."} if len(versions) > 1 else {}),
    }


def _environment(run: Run) -> dict[str, Any]:
    file = run.folder / "env.json"
    if not file.exists():
        return {}
    try:
        found: dict[str, Any] = json.loads(file.read_bytes())
    except ValueError:
        raise DataError(f"{file} is damaged; delete it, and the next run writes it anew") from None
    return found


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
    """An SVG of ours for use inside a page: no prolog or metadata, ids of its own, as wide as its column, and
    its four neutral colours left to the page's style sheet."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    head, tag_end, body = svg.partition(">")
    head = re.sub(r' (width|height)="[^"]*"', "", head) + f' role="img" aria-label="{Markup.escape(name)}"'
    body = re.sub(r'(\bid="|href="#|url\(#)', lambda match: match[1] + prefix, body)
    svg = head + tag_end + body
    for variable in ("ink", "muted", "grid", "paper"):
        svg = svg.replace(getattr(style, variable.upper()), f"var(--{variable})")
    return svg


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def _interval(low: float, high: float) -> str:
    return f"{low:.3f} to {high:.3f}".replace("-", "−")


def _range(values: Sequence[int]) -> str:
    if not values:
        return "no"
    return f"{values[0]:,}" if len(values) == 1 else f"{values[0]:,} to {values[-1]:,}"
