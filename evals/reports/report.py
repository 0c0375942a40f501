"""The report of a run: one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from ...engine.storage import write_atomic
from ...errors import DataError
from ..retrieval.score import settings
from ..runs import compare
from ..runs.result import Row, Run
from . import style
from .grid import Grid, Section
from .loss_section import loss_section
from .reach_table import reach_table
from .score_section import score_section


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
    story: Sequence[str],
    passages: Sequence[Passage] = (),
    plots: Sequence[Path] = (),
) -> Path:
    """Write everything in `run` as one self-contained HTML page without scripts or links; returns `out`.

    Args:
        run: rows of perplexity and of retrieval; env.json is shown if it is there.
        out: the file to write.
        title: the page's heading.
        story: sentences at the top; `findings(run)` computes them from the rows.
        passages: what the model wrote.
        plots: SVG files, set into the page as they are; a PNG is taken where its SVG is not listed too.

    Raises:
        DataError: a plot that is not there or is neither SVG nor PNG.
    """
    sections = [loss_section(run, group) for group in compare.settings(run.rows)]
    sections += [score_section(setting) for setting in settings(run.rows)]
    return write_page(
        out,
        title=title,
        subtitle=_subtitle(run.rows),
        story=story,
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
    story: Sequence[str],
    plots: Sequence[Path],
    sections: Sequence[Section],
    environment: dict[str, Any],
    reaches: Grid | None = None,
    passages: Sequence[Passage] = (),
) -> Path:
    """Write a report of these parts to `out`, and return it."""
    template = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = template.from_string((resources.files(__package__ or "") / "report.html.j2").read_text("utf-8")).render(
        title=title,
        subtitle=subtitle,
        story=story,
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


def environment_of(run: Run) -> dict[str, Any]:
    """What env.json of a run says; nothing if it is not there."""
    file = run.folder / "env.json"
    if not file.exists():
        return {}
    try:
        found: dict[str, Any] = dict(json.loads(file.read_bytes()))
    except (ValueError, TypeError, RecursionError):
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
