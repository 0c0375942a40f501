"""The report: self-contained, escaped, complete, honest about what is missing."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ropewalk.errors import DataError
from ropewalk.evals.reports.findings import findings
from ropewalk.evals.reports.loss_plots import plot_run
from ropewalk.evals.reports.report import Passage, write_report
from ropewalk.evals.runs.result import Run

MakeRun = Callable[..., Run]

VOID = {"meta", "br", "img", "hr", "link", "input", "wbr"}


class Page(HTMLParser):
    """Collects tags, attributes and ids of a page, and checks that tags are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def html(shared_smollm_run: Run) -> str:
    run = shared_smollm_run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ropewalk", "ppl", "toy", "--rope", "yarn:2"])
        run.write_environment()
    out = write_report(
        run,
        run.folder / "report.html",
        title="toy & <b>co</b>",
        passages=[Passage(prompt="To be, <script>alert(1)</script>", text="or <img src=x onerror=y>", rope="a|b")],
        plots=plot_run(run),
    )
    return out.read_text("utf-8")


def test_nothing_is_loaded_from_elsewhere(html: str) -> None:
    page = Page(html)
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert "img" not in page.tags
    for name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "action", "data", "srcset"):
            assert value.startswith("#"), (name, value)
        assert not name.startswith("on")
    assert "@import" not in html
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))
    without_names = re.sub(r'xmlns(:\w+)?="[^"]*"', "", html)
    assert "http" not in without_names
    assert "DOCTYPE svg" not in html


def test_passage_and_title_are_escaped(html: str) -> None:
    assert "<script>" not in html
    assert "To be, &lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "<b>co</b>" not in html
    assert "or <img src=x onerror=y>" in Page(html).text


def test_svg_references_lead_to_ids_of_the_page(html: str) -> None:
    page = Page(html)
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    targets = {value[1:] for name, value in page.attributes if name.endswith("href")}
    targets |= set(re.findall(r"url\(#([^)]*)\)", html))
    assert targets
    assert targets <= set(ids)


def test_neutral_colours_follow_the_page(html: str) -> None:
    svg = html[html.index("<svg") : html.index("</svg>")]
    assert "#1f2328" not in svg
    assert "#ffffff" not in svg
    assert "var(--ink)" in svg
    assert "prefers-color-scheme: dark" in html


def test_everything_is_in_it(html: str, shared_smollm_run: Run) -> None:
    text = Page(html).text
    for sentence in findings(shared_smollm_run):
        assert sentence in text
    for part in ("3.480", "+2.620", "−0.010", "reference", "not run", "340", "900 MB", "1,024 tokens per cell"):
        assert part in text, part
    assert "ab" * 32 in text
    assert "the same last tokens are scored in all of them" in text
    assert "ropewalk ppl toy --rope yarn:2" in text
    assert "torch threads" in text


def test_a_narrow_page_breaks_lines_between_the_parts_of_a_spec_and_the_words_of_the_command(html: str) -> None:
    assert "<code>rerope:4k|<wbr>logn</code>" in html
    assert '<span class="word">--rope</span> <span class="word">yarn:2</span>' in html


def test_two_plots_do_not_share_ids(make_run: MakeRun) -> None:
    make_run({"none": {8: 3.5, 16: 6.0}})
    run = make_run({"none": {8: 3.5}}, protocol="sliding", stride=256)
    out = write_report(run, run.folder / "r.html", title="t", plots=plot_run(run))
    html = out.read_text("utf-8")
    ids = [value for name, value in Page(html).attributes if name == "id"]
    assert html.count("<svg") == 2
    assert len(ids) == len(set(ids))
    assert "Results 2" in html


def test_png_alone_is_embedded(make_run: MakeRun) -> None:
    run = make_run({"none": {8: 3.5}})
    png, _ = plot_run(run)
    html = write_report(run, run.folder / "r.html", title="t", plots=[png]).read_text("utf-8")
    assert 'src="data:image/png;base64,iVBOR' in html
    assert "<svg" not in html


def test_run_with_gaps_and_without_environment(make_run: MakeRun) -> None:
    run = make_run({"a": {8: 3.5, 16: None}}, protocol="truncate")
    text = Page(write_report(run, run.folder / "r.html", title="t").read_text("utf-8")).text
    assert "out of memory" in text
    assert "Difference to the untouched model" not in text
    assert "The environment was not recorded in this run." in text


def test_run_with_failures_only(make_run: MakeRun) -> None:
    run = make_run({"none": {8: None}})
    text = Page(write_report(run, run.folder / "r.html", title="t").read_text("utf-8")).text
    assert "no tokens per cell" in text


def test_empty_run(make_run: MakeRun) -> None:
    run = make_run({})
    text = Page(write_report(run, run.folder / "r.html", title="t").read_text("utf-8")).text
    assert "No perplexity row has been measured yet." in text


def test_plots_that_cannot_be_shown_are_refused(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run({"none": {8: 3.5}})
    with pytest.raises(DataError, match="is not there"):
        write_report(run, tmp_path / "r.html", title="t", plots=[tmp_path / "loss.svg"])
    (tmp_path / "loss.pdf").write_bytes(b"%PDF")
    with pytest.raises(DataError, match="neither SVG nor PNG"):
        write_report(run, tmp_path / "r.html", title="t", plots=[tmp_path / "loss.pdf"])


def test_damaged_environment_is_named(make_run: MakeRun) -> None:
    run = make_run({"none": {8: 3.5}})
    (run.folder / "env.json").write_text("{")
    with pytest.raises(DataError, match=r"env\.json is damaged"):
        write_report(run, run.folder / "r.html", title="t")


def test_the_speed_of_short_cells_is_left_out_and_runs_are_told_apart(make_run: MakeRun) -> None:
    run = make_run({"none": {2: 3.6, 8: 3.5, 16: 5.0}})  # 6, 24 and 48 seconds
    for row, started in zip(run.rows, ("a", "a", "b"), strict=True):
        run.copy(row | {"run_started": started}, run.losses(row))
    text = Page(write_report(run, run.folder / "r.html", title="t").read_text("utf-8")).text
    speed = text.partition("Speed and memory")[2].partition("How it was measured")[0]
    assert "measured in 2 runs of the command" in speed
    assert re.search(r"none\s*–\s*340\s*24 s900 MBrun 1\s*340\s*48 s900 MBrun 2", speed), speed
    run = make_run({"none": {1: 3.6}}, text="short", text_sha256="ef" * 32)
    for row in run.rows[:-1]:
        run.copy(row | {"seconds": 3.0}, None)
    assert "Speed and memory" not in write_report(run, run.folder / "r.html", title="t").read_text("utf-8")
