"""The demo on the tiny model: sizing, the time limit, resuming, and what comes out."""

import dataclasses
import json

import pytest

from ropewalk.engine.model import Model
from ropewalk.evals import demo
from ropewalk.evals.demo import DemoPlan
from ropewalk.evals.models.measured import ForwardCost
from ropewalk.evals.runs.result import Run

SMOLLM2 = ForwardCost(dense=212e6, attention=69_120)
L = 8192


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


def sized(rate, seconds=250.0):
    return DemoPlan.sized(L, SMOLLM2, rate, seconds, 80.0)


def test_a_faster_machine_reads_longer_then_more_places():
    assert (sized(20e9).longest, sized(20e9).samples) == (int(1.5 * L), 1)  # does not fit, and is the least
    assert (sized(150e9).longest, sized(150e9).samples) == (int(1.75 * L), 1)
    assert (sized(200e9).longest, sized(200e9).samples) == (2 * L, 1)
    assert (sized(1e12).longest, sized(1e12).samples) == (2 * L, 4)
    for rate in (125e9, 150e9, 200e9, 1e12):
        plan = sized(rate)
        assert plan.fits(SMOLLM2, rate, 250)
        needed = (L // 4, L, plan.longest, plan.longest, plan.longest)
        assert SMOLLM2.passes(needed) * plan.samples / rate <= 250
    assert not sized(20e9).fits(SMOLLM2, 20e9, 250)


def test_a_short_limit_is_kept_and_the_next_run_goes_on(small_demo, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    small_demo(max_minutes=0.001, out=out)
    shown = " ".join(capsys.readouterr().out.split())
    assert "at most 0.001 minutes" in shown
    assert not cells(out)
    assert "Left out for lack of time: none at 64, none at 384, auto at 384, none at 256, yarn:2 at 384" in shown
    small_demo(max_minutes=10, out=out)
    contexts = (64, 128, 256, 384)
    assert cells(out) == {(rope, n) for rope in ("none", "auto", "yarn:2") for n in contexts}
    shown = " ".join(capsys.readouterr().out.split())
    assert "Left out" not in shown
    assert "auto is the untouched model up to 256 and self-extend:8,window=64 beyond" in shown
    assert "The untouched model, nats per token: 64" in shown
    assert demo.RECOMMENDATION in shown
    rows = {(row["rope"], row["context"]): row["loss"] for row in Run(out).rows}
    assert rows["auto", 256] == rows["none", 256]
    assert rows["auto", 384] < rows["none", 384]
    passage = json.loads((out / "passage.json").read_text(encoding="utf-8"))
    assert passage["text"].strip() in shown or len(passage["text"].split()) > 1

    def no_forward(*_, **__):
        raise AssertionError("the passage is written once")

    monkeypatch.setattr("ropewalk.engine.model.Model.generate_ids", no_forward)
    small_demo(max_minutes=10, out=out)
    shown = " ".join(capsys.readouterr().out.split())
    assert "8 of 8 cells were measured before" in shown or "9 of 9 cells were measured before" in shown
    for name in ("report.html", "table.md", "table.csv", "loss.png", "loss.svg", "env.json", "plan.json"):
        assert (out / name).stat().st_size > 0


def test_auto_within_the_trained_length_is_measured_once_and_exact(small_demo, tmp_path):
    small_demo(max_minutes=10, out=tmp_path / "run")
    run = Run(tmp_path / "run")
    untouched, auto = (
        next(row for row in run.rows if (row["rope"], row["context"]) == (rope, 128)) for rope in ("none", "auto")
    )
    assert (run.losses(untouched) == run.losses(auto)).all()
    assert auto["chosen"] == "none"


def test_the_passage_is_the_same_from_the_measured_cache_and_from_the_start(small_demo, tmp_path):
    first = tmp_path / "a"
    small_demo(max_minutes=10, out=first)
    passage = (first / "passage.json").read_text(encoding="utf-8")
    (first / "passage.json").unlink()
    small_demo(max_minutes=10, out=first)  # nothing left to measure, so no cache to go on from
    assert (first / "passage.json").read_text(encoding="utf-8") == passage


def test_full_goes_to_four_times_the_trained_length(small_demo, tmp_path):
    small_demo(max_minutes=None, out=tmp_path / "run")
    ropes = ("none", "auto", "yarn:4", "linear:4", "ntk:8")
    assert cells(tmp_path / "run") == {(m, c) for m in ropes for c in (64, 128, 256, 512, 1024)}


def test_a_method_without_a_finite_loss_writes_no_passage(small_demo, tmp_path, monkeypatch):
    score = Model.score_ids

    def broken(model, ids, *more):
        return score(model, ids, *more) * (float("nan") if len(ids) == 512 and not model.rope.parts else 1)

    monkeypatch.setattr(Model, "score_ids", broken)
    for _ in range(2):  # the second one finds the measurements of the first
        small_demo(max_minutes=10, out=tmp_path / "run")
        assert json.loads((tmp_path / "run" / "passage.json").read_text(encoding="utf-8"))["rope"] != "none"
    assert [row["rope"] for row in Run(tmp_path / "run").rows if row["loss"] is None] == ["none"]
