"""The demo on the tiny model: what the time limit may leave out, resuming, and what comes out."""

import dataclasses
import json

import pytest

from ropewalk.engine.model import Model
from ropewalk.evals import demo
from ropewalk.evals.runs.result import Run


@pytest.fixture
def small_demo(monkeypatch, tiny_folder, held_out_texts, tmp_path):
    """`run_demo` on the tiny model (trained length 256) and one held-out source file."""
    text = tmp_path / "text.py"
    text.write_text(max(held_out_texts, key=len)[:40_000], encoding="utf-8")
    monkeypatch.setattr(demo, "MODEL", str(tiny_folder))
    monkeypatch.setattr(demo, "TEXT", str(text))
    monkeypatch.setattr(demo, "TARGET", 32)
    monkeypatch.setattr(demo, "PASSAGE", dataclasses.replace(demo.PASSAGE, max_new_tokens=8))
    return demo.run_demo


def cells(folder):
    return {(row["rope"], row["context"]) for row in Run(folder).rows}


def test_the_time_limit_leaves_out_only_what_is_not_essential_and_the_next_run_measures_it(
    small_demo, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "run"
    small_demo(full=False, max_minutes=0, out=out)
    methods = demo.specs(2)
    essential = {(m, c) for m in methods for c in (64, 512)} | {("none", 256)}
    assert cells(out) == essential
    shown = " ".join(capsys.readouterr().out.split())
    assert "Left out for lack of time" in shown
    assert "yarn:2 at 256" in shown.partition("Left out")[2]
    assert "auto is the untouched model up to 256 and self-extend:8,window=64 beyond" in shown
    assert demo.RECOMMENDATION in shown
    rows = {(row["rope"], row["context"]): row["loss"] for row in Run(out).rows}
    assert rows["auto", 64] == rows["none", 64]
    assert rows["auto", 512] < rows["none", 512]
    passage = json.loads((out / "passage.json").read_text(encoding="utf-8"))
    assert passage["rope"] in methods

    def no_forward(*_, **__):
        raise AssertionError("the passage is written once")

    monkeypatch.setattr("ropewalk.engine.model.Model.generate_ids", no_forward)
    small_demo(full=False, max_minutes=None, out=out)
    assert cells(out) == {(m, c) for m in methods for c in (64, 128, 256, 512)}
    assert "Left out" not in capsys.readouterr().out
    for name in ("report.html", "table.md", "table.csv", "loss.png", "loss.svg", "env.json"):
        assert (out / name).stat().st_size > 0


def test_the_passage_is_the_same_from_the_measured_cache_and_from_the_start(small_demo, tmp_path):
    first = tmp_path / "a"
    small_demo(full=False, max_minutes=0, out=first)
    passage = (first / "passage.json").read_text(encoding="utf-8")
    (first / "passage.json").unlink()
    small_demo(full=False, max_minutes=0, out=first)  # nothing left to measure, so no cache to go on from
    assert (first / "passage.json").read_text(encoding="utf-8") == passage


def test_full_goes_to_four_times_the_trained_length(small_demo, tmp_path):
    small_demo(full=True, max_minutes=None, out=tmp_path / "run")
    assert cells(tmp_path / "run") == {(m, c) for m in demo.specs(4) for c in (64, 128, 256, 512, 1024)}


def test_a_method_without_a_finite_loss_writes_no_passage(small_demo, tmp_path, monkeypatch):
    score = Model.score_ids

    def broken(model, ids, *more):
        return score(model, ids, *more) * (float("nan") if len(ids) == 512 and not model.rope.parts else 1)

    monkeypatch.setattr(Model, "score_ids", broken)
    for _ in range(2):  # the second one finds the measurements of the first
        small_demo(full=False, max_minutes=0, out=tmp_path / "run")
        assert json.loads((tmp_path / "run" / "passage.json").read_text(encoding="utf-8"))["rope"] != "none"
    assert [row["rope"] for row in Run(tmp_path / "run").rows if row["loss"] is None] == ["none"]
