"""Tables: what is bold, what is missing, what the long CSV holds."""

from __future__ import annotations

import csv
from collections.abc import Callable
from typing import Any

import pytest

from ropewalk.errors import DataError
from ropewalk.evals.reports.tables import loss_table, to_csv, write_tables
from ropewalk.evals.runs import compare
from ropewalk.evals.runs.result import Run

MakeRun = Callable[..., Run]


def test_methods_down_contexts_across(make_run: MakeRun) -> None:
    run = make_run({"yarn:2": {16: 3.5, 8: 3.4956}, "none": {8: 3.48, 16: 6.1}})
    assert loss_table(run.rows).to_markdown() == (
        "Loss in nats per token, toy (float32) on novel; fixed-target: the same last 1024 tokens at every context.\n"
        "\n"
        "| method | 8k | 16k |\n"
        "|---|---|---|\n"
        "| `none` | **3.480** | 6.100 |\n"
        "| `yarn:2` | 3.496 | **3.500** |\n"
    )


def test_cell_has_its_interval(make_run: MakeRun) -> None:
    run = make_run({"none": {8: 3.48}})
    ((cell,),) = loss_table(run.rows).cells
    assert cell.interval is not None
    assert cell.interval == (run.rows[0]["loss_low"], run.rows[0]["loss_high"])
    assert cell.interval[0] < 3.48 < cell.interval[1]


def test_missing_cells_say_so(make_run: MakeRun) -> None:
    run = make_run({"none": {8: 3.48, 16: 6.1}, "yarn:2": {8: 3.5}, "ntk:4": {8: 3.5, 16: None}})
    lines = loss_table(run.rows).to_markdown().splitlines()
    assert lines[-2] == "| `yarn:2` | 3.500 | not run |"
    assert lines[-1] == "| `ntk:4` | 3.500 | not run (out of memory) |"
    assert "**6.100**" not in lines[-3]  # it is the only one of its column


def test_ties_to_three_digits_are_all_bold(make_run: MakeRun) -> None:
    run = make_run({"none": {8: 3.48}, "a": {8: 3.4801}, "b": {8: 3.481}})
    assert [cell.is_best for (cell,) in loss_table(run.rows).cells] == [True, True, False]


def test_pipes_do_not_break_the_table(make_run: MakeRun) -> None:
    run = make_run({"rerope:512|logn": {8: 3.5}})
    assert r"| `rerope:512\|logn` | 3.500 |" in loss_table(run.rows).to_markdown()


def test_rows_of_two_settings_are_refused(make_run: MakeRun) -> None:
    make_run({"none": {8: 3.48}})
    run = make_run({"none": {8: 3.40}}, text_sha256="cd" * 32)
    with pytest.raises(DataError, match="one group, not 2"):
        loss_table(run.rows)
    with pytest.raises(DataError, match="not 0: none"):
        loss_table([])


def test_other_scored_tokens_are_another_setting(make_run: MakeRun) -> None:
    make_run({"none": {8: 3.48}})
    run = make_run({"yarn:2": {8: 3.40}}, places="0:30000")
    with pytest.raises(DataError, match="not 2"):
        loss_table(run.rows)


@pytest.mark.parametrize("field", ["tokenizer", "weights", "text_tokens"])
def test_any_other_field_of_the_recipe_is_another_setting(make_run: MakeRun, field: str) -> None:
    make_run({"none": {8: 3.48}})
    run = make_run({"none": {8: 3.40}}, **{field: "other"})
    assert len(compare.comparable_groups(run.rows)) == 2


def test_csv_is_long_and_complete() -> None:
    rows: list[dict[str, Any]] = [
        {"key": "a", "rope": "none", "loss": 3.5, "versions": {"torch": "2", "ropewalk": "0.1"}},
        {"key": "b", "rope": 'x,"y"', "loss": None, "reason": "out of memory"},
    ]
    found = list(csv.DictReader(to_csv(rows).splitlines()))
    assert [row["key"] for row in found] == ["a", "b"]
    assert found[0]["versions.torch"] == "2"
    assert found[1] == {
        "key": "b",
        "rope": 'x,"y"',
        "loss": "",
        "versions.torch": "",
        "versions.ropewalk": "",
        "reason": "out of memory",
    }


def test_files_of_a_run(make_run: MakeRun) -> None:
    make_run({"none": {8: 3.48, 16: 6.1}, "yarn:2": {16: 3.5}})
    run = make_run({"none": {8: 3.40}}, protocol="sliding", target=1024)
    markdown, csv_file = write_tables(run)
    assert (markdown.name, csv_file.name) == ("table.md", "table.csv")
    assert markdown.read_text().count("| method |") == 3  # two of losses, one of effective lengths
    rows = list(csv.DictReader(csv_file.read_text().splitlines()))
    assert rows[0]["delta"] == "0.0"
    assert float(rows[1]["delta"]) == pytest.approx(2.62, abs=1e-5)
    assert float(rows[1]["delta_low"]) < 2.62 < float(rows[1]["delta_high"])
    assert rows[3]["protocol"] == "sliding"
    assert rows[3]["delta"] == ""


def test_empty_run_has_files_too(make_run: MakeRun) -> None:
    markdown, _ = write_tables(make_run({}))
    assert markdown.read_text() == "Nothing has been measured yet.\n"


HARM = {"base_loss": 3.4, "difference": 0.0223, "difference_low": -0.0056, "difference_high": 0.054} | {
    "kl": 0.0188,
    "kl_low": None,
    "kl_high": None,
    "same_top1": 87.5,
}
REPEAT = {"fresh_loss": 3.364, "gain": 2.937, "gain_low": 2.314, "gain_high": 3.409}


@pytest.mark.parametrize(
    ("protocol", "extra", "lines"),
    [
        (
            "harm",
            HARM,
            (
                "harm: the last 1024 tokens, against the untouched model at the same context.",
                r"| `yarn:2\|logn` | – | 0.0188 |",
                r"| `yarn:2\|logn` | – | 87.5 % |",
                r"| `yarn:2\|logn` | – | +0.0223 (-0.0056 to +0.0540) |",
            ),
        ),
        (
            "repeat",
            REPEAT,
            (
                "repeat: the last 1024 tokens, which are also at the beginning of every window.",
                r"| `yarn:2\|logn` | – | 3.364 |",
                r"| `yarn:2\|logn` | – | +2.937 (+2.314 to +3.409) |",
            ),
        ),
        (
            "longppl",
            {"candidates": 4096, "judge": "dual-chunk at 16384"},
            ("1024 of 4096 tokens that need far context, the same everywhere, chosen by dual-chunk at 16384 tokens.",),
        ),
        ("llamacpp", {}, ("llamacpp: the second half of each chunk.",)),
        ("disjoint", {}, ("disjoint: every token once, in windows that share one token.",)),
        ("sliding", {"stride": 256}, ("sliding: the new tokens of a window that slides by 256.",)),
    ],
)
def test_protocols_say_what_they_scored_and_what_they_measured_besides(
    make_run: MakeRun, protocol: str, extra: dict[str, Any], lines: tuple[str, ...]
) -> None:
    run = make_run({"yarn:2|logn": {8: 3.5, 4: None}}, protocol=protocol, **extra)
    table = write_tables(run)[0].read_text()
    assert r"| `yarn:2\|logn` | not run (out of memory) | 3.500 |" in table
    for line in lines:
        assert line in table
    assert table.count("| method |") == {"harm": 4, "repeat": 3}.get(protocol, 1)
