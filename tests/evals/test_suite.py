"""Whole runs: everything by preset, several runs as one, two runs compared, and the text behind a row."""

import dataclasses
import json

import numpy as np
import pytest
from click.testing import CliRunner
from transformers import AutoTokenizer

from ropewalk.cli.main import cli
from ropewalk.errors import DataError, RopewalkError
from ropewalk.evals.reports import report
from ropewalk.evals.reports.report import passages_of
from ropewalk.evals.reports.tables import reach_table
from ropewalk.evals.retrieval.score import MEASURED as TRIAL_MEASURED
from ropewalk.evals.runs import preset
from ropewalk.evals.runs.compare import MEASURED
from ropewalk.evals.runs.compare_runs import compare_runs
from ropewalk.evals.runs.result import Run, environment_of, merge, open_run, recipe_key

SMALL = preset.Preset(
    minutes=None,
    loss=("128", "1x"),
    target=32,
    samples=2,
    by_position=("2x",),
    harm=("128", "2x"),
    passkey=("512",),
    passkey_trials=1,
    ruler=("1k",),
    ruler_trials=1,
    ruler_tasks=("niah_multikey_2", "fwe"),
)


def ropewalk(*arguments):
    return CliRunner().invoke(cli, list(map(str, arguments)), catch_exceptions=False)


def mistake(*arguments):
    with pytest.raises(RopewalkError) as caught:
        ropewalk(*arguments)
    return str(caught.value)


@pytest.fixture(scope="module")
def text_file(tmp_path_factory, held_out_texts):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n".join(held_out_texts)[:60_000])
    return file


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_folder, text_file):
    """A run of everything under two scalers."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(preset.PRESETS, "smoke", SMALL)
        command = ("all", tiny_folder, "--preset", "smoke", "--rope", "none", "--rope", "yarn:2", "--text", text_file)
        with pytest.MonkeyPatch.context() as plotless:
            for plots in ("plot_run", "plot_retrieval"):
                plotless.setattr(report, plots, lambda run: [])
            done = ropewalk(*command, "--out", out)
        assert done.exit_code == 0, done.output
        again = ropewalk(*command, "--out", out)
    assert again.exit_code == 0, again.output
    return out


def test_everything_is_measured_once_and_reported(whole):
    rows = [json.loads(line) for line in (whole / "results.jsonl").read_text().splitlines()]
    assert len({row["key"] for row in rows}) == len(rows)  # the second run measured nothing
    kinds = [(row["task"], row.get("protocol"), row["rope"], row["context"]) for row in rows]
    expected = [("ppl", "fixed-target", rope, n) for rope in ("none", "yarn:2") for n in (128, 256)]
    expected += [("ppl", "harm", "yarn:2", n) for n in (128, 256)]
    expected += [("passkey", None, rope, 512) for rope in ("none", "yarn:2") for _ in range(3)]
    expected += [(task, None, rope, 1024) for rope in ("none", "yarn:2") for task in ("niah_multikey_2", "fwe")]
    expected += [("ppl", "by-position", rope, 512) for rope in ("none", "yarn:2") for _ in range(2)]
    assert sorted(kinds, key=str) == sorted(expected, key=str)
    html, tables = (whole / "report.html").read_text(), (whole / "table.md").read_text()
    for words in ("Effective length", "KL divergence", "Right answers", "Loss by position", "fixed-target"):
        assert words in html
    assert "Effective length" in tables and "KL divergence" in tables and "| `yarn:2`" in tables
    assert "http-equiv" not in html and "<script" not in html
    names = {file.stem for file in whole.glob("*.svg")}
    assert names >= {"loss", "loss_by_position", "harm", "passkey_heat", "ruler_11_offline_heat"}


def test_reach_table_has_a_column_for_each_rule_that_can_be_told(whole, smollm_run):
    grid = reach_table(Run(whole))
    assert grid is not None
    assert grid.columns == ("passkey",)  # RULER-11 needs all of its tasks, and 64 tokens have no interval
    assert [rope for rope, _ in grid.rows] == ["none", "yarn:2"]
    (passkeys,) = dict(grid.rows)["none"]
    assert passkeys.text == "fails"
    by_loss = reach_table(smollm_run)
    assert by_loss is not None and by_loss.columns == ("loss on novel",)
    assert by_loss.rows[0][0] == "none" and by_loss.rows[0][1][0].main == "10k"


def test_every_row_has_its_text_again(whole, tiny_folder, monkeypatch):
    run, tokenizer = open_run(whole), AutoTokenizer.from_pretrained(tiny_folder)
    rows = run.rows
    for row in rows:
        passages = passages_of(row, rows, tokenizer)
        assert all(passages)
        if row["task"] == "ppl":
            tokens = [len(tokenizer(p, add_special_tokens=False).input_ids) for p in passages]
            assert max(tokens) == pytest.approx(row["context"], abs=4)  # a cut character may be written otherwise
    printed = ropewalk("reconstruct", whole, "--row", 1)
    assert printed.output.rstrip("\n") == "\n".join(passages_of(rows[0], rows, tokenizer)).rstrip("\n")
    fixed = next(row for row in rows if row["protocol"] == "fixed-target")
    with pytest.raises(DataError, match="do not come out so again"):
        passages_of(fixed | {"places": "0:17,0:40"}, rows, tokenizer)
    for row in rows:
        if row["task"] == "ppl":
            assert passages_of({**row, "tokens_sha256": None}, rows, tokenizer)  # of before it was stored
            with pytest.raises(DataError, match="scored other tokens"):
                passages_of(row | {"tokens_sha256": "0"}, rows, tokenizer)
    with pytest.raises(DataError, match="has sha256"):
        passages_of(fixed | {"text_sha256": "0"}, rows, tokenizer)


def test_rows_of_many_windows_have_their_text_again_with_the_hash_of_their_places_or_without(
    tiny_folder, text_file, no_plots, tmp_path
):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    options = ("--lengths", "64", "--target", "16", "--samples", "20", "--text", text_file, "--out", tmp_path)
    assert ropewalk("ppl", tiny_folder, *options).exit_code == 0
    (row,) = open_run(tmp_path).rows
    passages = passages_of(row, [row], tokenizer)
    assert len(passages) == 20
    before = row["places"].partition(", sha256")[0]  # as older versions wrote it
    assert before != row["places"] and passages_of(row | {"places": before}, [row], tokenizer) == passages
    with pytest.raises(DataError, match="do not come out so again"):
        passages_of(row | {"places": f"{before}, sha256 00000000"}, [row], tokenizer)


@pytest.mark.parametrize("name", ["quick", "full"])
def test_presets_for_a_model_that_was_trained_on_little(tiny_folder, text_file, monkeypatch, caplog, name):
    """256 tokens: every curve is there, and only prompts that do not fit are left out."""
    planned = []
    monkeypatch.setattr("ropewalk.evals.runs.measure.print_plan", lambda subject, cells, console: planned.extend(cells))
    done = ropewalk("all", tiny_folder, "--preset", name, "--text", text_file, "--dry-run")
    assert done.exit_code == 0, done.output
    recipes = [cell.recipe for cell in planned]
    assert {(one["protocol"], one["target"]) for one in recipes if one["task"] == "ppl"} >= {
        *(("fixed-target", 32), ("harm", 32))
    }
    passkeys = [cell.context for cell in planned if cell.recipe["task"] == "passkey"]
    assert set(passkeys) == {"quick": set(), "full": {128, 256, 512, 1024}}[name]
    assert [cell.scaler.parts == () for cell in planned if cell.recipe["task"] == "passkey"] == (
        [True] * 12 + [False] * 12 if name == "full" else []
    )
    assert "niah_single_1 at " in caplog.text and "the shortest prompt and its answer take" in caplog.text


def test_the_usual_command_for_a_model_that_was_trained_on_little(tiny_folder, text_file, no_plots, tmp_path):
    done = ropewalk("ppl", tiny_folder, "--text", text_file, "--out", tmp_path)
    assert done.exit_code == 0, done.output
    assert [(row["context"], row["target"]) for row in open_run(tmp_path).rows] == [
        (length, 32) for length in (64, 128, 256, 512)
    ]


def test_a_row_that_is_not_there(whole):
    assert "there is no row 999" in mistake("reconstruct", whole, "--row", 999)


def test_several_runs_become_one(make_run, tmp_path):
    first = make_run({"none": {8: 3.5, 16: 6.0}})
    second = Run(tmp_path / "second")
    row = first.rows[0]
    second.copy(row | {"loss": 3.6}, np.full(1024, 3.6, np.float32))  # the same cell, measured later
    third = second.copy(row | {"key": "x", "rope": "yarn:2"}, None)
    first.write_environment({"python": "3.12", "command": "ropewalk ppl a"})
    second.write_environment({"python": "3.12", "command": "ropewalk ppl b"})
    merged = merge([first, second], tmp_path / "merged")
    assert environment_of(merged) == {"python": "3.12", "command": "ropewalk ppl a; ropewalk ppl b"}
    assert {r["key"] for r in merged.rows} == {*(r["key"] for r in first.rows), "x"}
    assert merged.find_key(row["key"])["loss"] == 3.6 and merged.losses(row)[0] == np.float32(3.6)
    assert merged.find_key("x") == third
    assert len(merge([first, second], tmp_path / "merged").rows) == 3


def test_report_needs_a_folder_for_several_runs_and_results_in_each(whole, no_plots, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "name it with --out" in mistake("report", whole, whole)
    assert "not the folder of a run" in mistake("report", tmp_path / "empty")
    assert ropewalk("report", whole, whole, "--out", tmp_path / "both").exit_code == 0
    assert (tmp_path / "both" / "report.html").exists()


def test_runs_are_compared_cell_by_cell_on_the_same_tokens(make_run, tmp_path):
    a = make_run({"none": {8: 3.5, 16: 6.0}, "yarn:2": {8: 3.6}})
    b = Run(tmp_path / "b")
    for row in a.rows:
        b.copy(row | {"key": f"b{row['key']}", "dtype": "int8", "loss": row["loss"] + 0.25}, a.losses(row) + 0.25)
    comparison = compare_runs(a, b)
    assert [(pair.what, pair.rope, pair.verdict) for pair in comparison.pairs] == [
        ("fixed-target at 8k", "none", "A better"),
        ("fixed-target at 16k", "none", "A better"),
        ("fixed-target at 8k", "yarn:2", "A better"),
    ]
    assert all(pair.difference.mean == pytest.approx(0.25, abs=1e-6) for pair in comparison.pairs)
    assert (comparison.only_a, comparison.only_b) == (0, 0)
    assert {pair.verdict for pair in compare_runs(a, a).pairs} == {"the same"}


def test_runs_of_one_scaler_each_compare_the_scalers(tmp_path, make_run):
    whole = make_run({"none": {8: 3.5, 16: 6.0}, "yarn:2": {8: 3.6, 16: 3.55}})
    parts = [Run(tmp_path / name) for name in ("a", "b")]
    for part, rope in zip(parts, ("none", "yarn:2"), strict=True):
        for row in whole.rows:
            if row["rope"] == rope:
                part.copy(row, whole.losses(row))
    comparison = compare_runs(*parts)
    assert [(pair.rope, pair.verdict) for pair in comparison.pairs] == [
        ("none against yarn:2", "A better"),
        ("none against yarn:2", "B better"),
    ]


def test_answers_are_paired_by_trial(whole, tmp_path):
    a, b = Run(whole), Run(tmp_path / "b")
    for row in a.rows:
        if row["task"] == "passkey":
            b.copy(row | {"correct": 1.0}, None)
    pairs = compare_runs(a, b).pairs
    assert [(pair.what, pair.unit, pair.b) for pair in pairs] == [("passkey at 512, n=3", "right answers", 1.0)] * 2


def trial(run, seed, correct, **recipe):
    shared = {"suite": "niah", "task": "niah", "model": "toy", "text_sha256": "ab", "dtype": "float32", "form": 1}
    shared |= {"rope": "none", "context": 256, "depth": 0.5, "seed": seed}
    run.add(shared | recipe, {"correct": correct, "prompt_sha256": str(seed)})


def test_four_trials_tell_nothing_apart(tmp_path):
    a, b = Run(tmp_path / "a"), Run(tmp_path / "b")
    for seed in range(4):
        trial(a, seed, 0.0)
        trial(b, seed, 1.0)
    (pair,) = compare_runs(a, b).pairs
    assert (pair.difference.mean, pair.verdict) == (1.0, "not distinguishable")
    assert pair.difference.low < 0


def test_trials_that_only_one_run_has_are_counted(tmp_path):
    a, b = Run(tmp_path / "a"), Run(tmp_path / "b")
    for seed in range(10):
        trial(a, seed, 1.0)
    for seed in range(7, 12):
        trial(b, seed, 1.0)
    comparison = compare_runs(a, b)
    assert [pair.what for pair in comparison.pairs] == ["niah at 256, n=3"]
    assert (comparison.only_a, comparison.only_b) == (7, 2)


def test_the_judge_of_longppl_is_not_a_scaler_of_the_run(tmp_path, make_run):
    whole = make_run({"none": {8: 3.5}, "yarn:2": {8: 3.6}})
    parts = [Run(tmp_path / name) for name in ("a", "b")]
    for part, row in zip(parts, whole.rows, strict=True):
        part.copy(row, whole.losses(row))
        part.add({"task": "judge", "rope": "dual-chunk"}, {"loss": 3.0})
    (pair,) = compare_runs(*parts).pairs
    assert pair.rope == "none against yarn:2"


def test_other_tokens_are_not_paired(make_run, tmp_path):
    a = make_run({"none": {8: 3.5}})
    b = Run(tmp_path / "b")
    row = a.rows[0]
    b.copy(row | {"model": "other", "bits_per_byte": 1.0}, np.ones(700, np.float32))
    (pair,) = compare_runs(a, b).pairs
    assert (pair.unit, pair.b, pair.difference, pair.verdict) == ("bits per byte", 1.0, None, "no interval")


def test_losses_are_paired_where_the_scored_tokens_are_the_same(make_run, tmp_path):
    a = make_run({"none": {8: 3.5}})
    (row,), losses = a.rows, a.losses(a.rows[0])
    a.copy(row | {"tokens_sha256": "a"}, losses)

    def unit(**changes):
        b = Run(tmp_path / "b")
        b.copy(row | changes, losses + 0.25)
        pairs = compare_runs(a, b).pairs
        return pairs[0].unit if pairs else None

    assert unit(tokens_sha256="a") == "nats per token"
    assert unit() == "nats per token"  # of before there was a hash
    assert unit(tokens_sha256="b", model="other") == "bits per byte"
    assert unit(tokens_sha256="b", model="other", places="0:9") == "bits per byte"
    assert unit(model="other", places="0:9") == "bits per byte"
    assert unit(tokens_sha256="b", places="0:9") is None  # the same tokenizer elsewhere in the text


def test_a_run_of_several_settings_is_refused(make_run, tmp_path):
    a = make_run({"none": {8: 3.5}})
    b = Run(tmp_path / "b")
    for key, dtype in (("x", "float32"), ("y", "int8")):
        b.copy(a.rows[0] | {"key": key, "dtype": dtype}, a.losses(a.rows[0]))
    with pytest.raises(DataError, match="fixed-target at 8k with dtype float32 and int8"):
        compare_runs(a, b)
    trials = Run(tmp_path / "trials")
    for dtype in ("float32", "int8"):
        trial(trials, 0, 1.0, dtype=dtype)
    with pytest.raises(DataError, match="niah at 256 with dtype float32 and int8"):
        compare_runs(trials, trials)


def test_what_is_not_of_the_recipe_is_known(whole):
    for row in Run(whole).rows:
        measured = TRIAL_MEASURED if "suite" in row else MEASURED
        assert recipe_key({field: value for field, value in row.items() if field not in measured}) == row["key"]


def test_runs_with_nothing_in_common(whole, make_run):
    other = make_run({"none": {8: 3.5}})
    assert "have no cell in common" in mistake("compare", whole, other.folder)
    more = Run(other.folder.parent / "more")
    more.copy(other.rows[0] | {"samples": 2}, None)
    assert "other settings of a protocol, such as --samples" in mistake("compare", other.folder, more.folder)


def test_presets_grow():
    smoke, quick, full = (preset.PRESETS[name] for name in ("smoke", "quick", "full"))
    assert (smoke.minutes, quick.minutes, full.minutes) == (1, 10, None)
    names = [field.name for field in dataclasses.fields(preset.Preset) if field.name.endswith("trials")]
    assert all(getattr(smoke, name) <= getattr(quick, name) <= getattr(full, name) for name in names)
