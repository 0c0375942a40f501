"""The demo on the tiny model: sizing, the time limit, resuming, and what comes out."""

import dataclasses
import json
import re
import time
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from rich.console import Console

from ropewalk.cli.main import cli
from ropewalk.engine.completion import Completion, Usage
from ropewalk.engine.model import Model
from ropewalk.evals import demo
from ropewalk.evals.demo_plan import DemoPlan
from ropewalk.evals.models.local import LocalModel
from ropewalk.evals.models.measured import ForwardCost
from ropewalk.evals.reports.verdict import Verdict, verdicts
from ropewalk.evals.runs import measure, progress
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


def test_a_machine_gets_what_it_has_time_for():
    """From 80 GFLOP/s on the untouched model at the trained length, too, from 140 on a second scaler."""
    ratios = {20: 1.125, 50: 1.25, 70: 1.5, 80: 1.375, 90: 1.5, 110: 1.5, 140: 1.5, 180: 1.75, 250: 2.0}
    assert {rate: (sized(rate * 1e9).longest / L, sized(rate * 1e9).samples) for rate in ratios} == {
        rate: (ratio, 1) for rate, ratio in ratios.items()
    }
    assert (sized(1e12).longest, sized(1e12).samples) == (2 * L, 4)
    for rate, others in ((50, []), (70, []), (80, [L]), (90, [L]), (110, [L]), (140, [L, 1.5 * L]), (250, [L, 2 * L])):
        assert SMOLLM2.passes([*[sized(rate * 1e9).longest] * 2, *others]) / rate / 1e9 <= 250


@pytest.fixture
def machine(small_demo, no_plots, monkeypatch):
    """A function that runs the demo as a machine of so many GFLOP/s would with SmolLM2-135M, for which the tiny
    model stands: a context of it counts as one 32 times as long. Returns the seconds that it took, and when and in
    which order the cells were done."""
    cost = ForwardCost(dense=32 * SMOLLM2.dense, attention=32 * 32 * SMOLLM2.attention)
    now = 0.0
    clock = SimpleNamespace(**{name: getattr(time, name) for name in dir(time)} | {"monotonic": lambda: now})
    for module in (demo, measure, progress):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(LocalModel, "cost", cost)
    losses, add, load, load_text = LocalModel.losses, Run.add, demo.load, demo.load_text

    def run(out, *, gflops, load_seconds=15.0, fetch_seconds=0.0, **settings):
        nonlocal now
        now, done = 0.0, {}

        def after(seconds, function):
            def delayed(*args, **named):
                nonlocal now
                now += seconds
                return function(*args, **named)

            return delayed

        monkeypatch.setattr(demo, "load", after(load_seconds, load))
        monkeypatch.setattr(demo, "load_text", after(fetch_seconds, load_text))

        def slow(model, ids, first, advance, length=None):
            def later(past, tokens):
                nonlocal now
                slices = 16  # of a second or so, as SmolLM2's chunks are
                for _ in range(slices):
                    now += cost.step(past, tokens) / slices / gflops / 1e9
                    advance(past, 0)
                advance(past, tokens)

            return losses(model, ids, first, later, length)

        def added(self, recipe, *rest):
            done.setdefault((recipe["rope"], recipe["context"]), now)
            return add(self, recipe, *rest)

        monkeypatch.setattr(LocalModel, "losses", slow)
        monkeypatch.setattr(Run, "add", added)
        small_demo(out=out, **settings)
        return now, done

    return run


@pytest.mark.parametrize("gflops", [600, 161])
def test_every_scaler_is_measured_beyond_the_trained_length_first(machine, tmp_path, gflops):
    seconds, done = machine(tmp_path / "run", gflops=gflops, max_minutes=5)
    assert seconds <= 300
    longest = max(context for _, context in done)
    order = list(done)
    beyond = [("none", longest), ("auto", longest), ("yarn:2", longest)]
    assert longest > 256
    assert [cell for cell in order if cell in beyond] == beyond
    assert {rope for rope, context in order[: order.index(beyond[-1])] if context < longest} <= {"none"}
    assert done["none", longest] <= 120, "the first curve"
    assert {("none", 64), ("none", 256)} <= {*order[: order.index(beyond[0])]}


def test_the_trained_length_comes_before_the_last_scaler_where_there_is_time_for_one_of_them(machine, tmp_path):
    seconds, done = machine(tmp_path / "run", gflops=100, max_minutes=5)
    assert seconds <= 300
    assert list(done)[:3] == [("none", 384), ("auto", 384), ("none", 256)]
    assert "yarn:2" not in {rope for rope, _ in done}


def test_a_slow_machine_goes_where_the_untouched_model_fails_without_the_last_scaler(machine, tmp_path):
    seconds, done = machine(tmp_path / "run", gflops=66, max_minutes=5)
    assert seconds <= 300
    assert list(done)[:2] == [("none", 384), ("auto", 384)] and "yarn:2" not in {rope for rope, _ in done}
    losses = {(row["rope"], row["context"]): row["loss"] for row in Run(tmp_path / "run").rows}
    assert losses["auto", 384] + 1 < losses["none", 384]


def test_a_slow_network_takes_none_of_the_time(machine, tmp_path):
    _, done = machine(tmp_path / "near", gflops=161, max_minutes=5)
    seconds, slowly = machine(tmp_path / "far", gflops=161, max_minutes=5, fetch_seconds=1000.0)
    assert list(slowly) == list(done)
    assert 1000 < seconds <= 1300


def test_a_machine_too_slow_for_all_goes_on_with_the_next_run(machine, tmp_path, capsys):
    """A sixth of the machine for which the demo was made. It has time for one scaler beyond the trained length."""
    out = tmp_path / "run"
    seconds, done = machine(out, gflops=27, max_minutes=5)
    assert seconds <= 300
    assert next(iter(done)) == ("none", 288)
    assert {rope for rope, _ in done} == {"none"}, "the line of another would end early"
    shown = " ".join(capsys.readouterr().out.split())
    assert "so what tells most comes first" in shown
    assert "Left out for lack of time: auto at 288, none at 256, yarn:2 at 288" in shown
    for _ in range(3):
        seconds, done = machine(out, gflops=27, max_minutes=5)
        assert seconds <= 300
    assert {("none", 288), ("auto", 288), ("yarn:2", 288)} <= cells(out)


def test_a_busy_machine_says_so_and_an_idle_one_makes_a_plan_of_its_own(machine, tmp_path, capsys):
    out = tmp_path / "run"
    _, done = machine(out, gflops=11, max_minutes=5)
    assert done.keys() == {("none", 64), ("none", 128)}
    shown = " ".join(capsys.readouterr().out.split())
    assert "One reading of 288 tokens alone is too long for the limit; --max-minutes" in shown
    _, done = machine(out, gflops=161, max_minutes=5)
    assert ("yarn:2", 448) in done and ("none", 128) not in done


def test_the_end_names_a_number_that_would_decide(small_demo, no_plots, tmp_path, capsys):
    small_demo(max_minutes=10, out=tmp_path / "run")
    shown = " ".join(capsys.readouterr().out.split())
    (one,) = verdicts(Run(tmp_path / "run"))
    assert "samples N" not in shown
    asked = re.search(r"About (\d+) samples would decide what is undecided: ropewalk ppl .* --samples (\d+)", shown)
    assert (asked is not None) == (one.samples is not None) == ("would decide it" in one.text)
    if asked:
        assert asked[1] == asked[2] == str(one.samples)


def test_the_result_as_json(small_demo, tmp_path):
    def shown(minutes):
        words = ["demo", "--json", "--max-minutes", str(minutes), "--out", str(tmp_path / "run")]
        done = CliRunner().invoke(cli, words, catch_exceptions=False)
        assert done.exit_code == 0 and done.stdout.count("\n") == 1
        return json.loads(done.stdout)

    nothing = shown(0.001)
    assert nothing["rows"] == nothing["verdict"] == []
    assert nothing["left_out"][:2] == [{"rope": "none", "length": "288"}, {"rope": "auto", "length": "288"}]
    result = shown(10)
    assert result["folder"] == str(tmp_path / "run") and result["left_out"] == []
    assert result["verdict"] == [one.text for one in verdicts(Run(tmp_path / "run"))]
    assert {(row["rope"], row["context"]) for row in result["rows"]} == cells(tmp_path / "run")


@pytest.mark.parametrize("samples", [None, 24])
def test_nothing_more_is_asked_where_all_is_decided(monkeypatch, capsys, samples):
    found = Verdict(text="", samples=samples, ropes=("none", "auto"), contexts=(256, 512))
    monkeypatch.setattr(demo, "verdicts", lambda run: [found])
    demo._print_what_decides(None, Console(width=500))
    shown = capsys.readouterr().out
    if samples is None:
        assert not shown
    else:
        assert "About 24 samples would decide" in shown
        assert "--rope none --rope auto --text shakespeare --lengths 256,512 --samples 24" in shown


def test_a_short_limit_is_kept_and_the_next_run_goes_on(small_demo, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    left_out = small_demo(max_minutes=0.001, out=out)
    shown = " ".join(capsys.readouterr().out.split())
    assert "at most 0.001 minutes" in shown
    assert not cells(out)
    assert "Left out for lack of time: none at 288, auto at 288, none at 256, yarn:2 at 288, none at 64" in shown
    assert [(str(cell.scaler), cell.context) for cell in left_out][:2] == [("none", 288), ("auto", 288)]
    small_demo(max_minutes=10, out=out)  # nothing was measured, so with the plan that this time allows
    contexts = (64, 128, 256, 512)
    assert cells(out) == {(rope, n) for rope in ("none", "auto", "yarn:2") for n in contexts}
    shown = " ".join(capsys.readouterr().out.split())
    assert "Left out" not in shown
    assert "auto is the untouched model up to 256 and self-extend:8,window=128 beyond" in shown
    assert "The untouched model, nats per token: 64" in shown
    assert demo.RECOMMENDATION in shown
    rows = {(row["rope"], row["context"]): row["loss"] for row in Run(out).rows}
    assert rows["auto", 256] == rows["none", 256]
    assert rows["auto", 512] < rows["none", 512]
    passage = json.loads((out / "passage.json").read_text(encoding="utf-8"))
    assert passage["text"].strip() in shown or len(passage["text"].split()) > 1

    def no_forward(*_, **__):
        raise AssertionError("the passage is written once")

    monkeypatch.setattr("ropewalk.engine.model.Model.generate_ids", no_forward)
    small_demo(max_minutes=10, out=out)
    shown = " ".join(capsys.readouterr().out.split())
    assert "9 of 9 cells were measured before" in shown
    for name in ("report.html", "table.md", "table.csv", "loss.png", "loss.svg", "env.json", "plan.json"):
        assert (out / name).stat().st_size > 0


def test_auto_within_the_trained_length_is_measured_once_and_exact(small_demo, no_plots, tmp_path):
    small_demo(max_minutes=10, out=tmp_path / "run")
    run = Run(tmp_path / "run")
    untouched, auto = (
        next(row for row in run.rows if (row["rope"], row["context"]) == (rope, 128)) for rope in ("none", "auto")
    )
    assert (run.losses(untouched) == run.losses(auto)).all()
    assert auto["chosen"] == "none"


def test_the_passage_is_the_same_from_the_measured_cache_and_from_the_start(small_demo, no_plots, tmp_path):
    first = tmp_path / "a"
    small_demo(max_minutes=10, out=first)
    passage = (first / "passage.json").read_text(encoding="utf-8")
    (first / "passage.json").unlink()
    small_demo(max_minutes=10, out=first)  # nothing left to measure, so no cache to go on from
    assert (first / "passage.json").read_text(encoding="utf-8") == passage


def test_a_passage_without_time_to_write_is_left_for_the_next_run(small_demo, no_plots, tmp_path, monkeypatch):
    completion = Completion(
        text="", token_ids=[], finish_reason="time", usage=Usage(prompt_tokens=9, completion_tokens=0)
    )
    monkeypatch.setattr(Model, "generate_ids", lambda *_, **__: completion)
    small_demo(max_minutes=10, out=tmp_path / "run")
    assert not (tmp_path / "run" / "passage.json").exists()


def test_full_goes_to_four_times_the_trained_length(small_demo, no_plots, tmp_path):
    small_demo(max_minutes=None, out=tmp_path / "run")
    ropes = ("none", "auto", "yarn:4", "linear:4", "ntk:8")
    assert cells(tmp_path / "run") == {(m, c) for m in ropes for c in (64, 128, 256, 512, 1024)}


def test_a_method_without_a_finite_loss_writes_no_passage(small_demo, no_plots, tmp_path, monkeypatch):
    losses = LocalModel.losses

    def broken(local, ids, *more):
        return losses(local, ids, *more) * (float("nan") if len(ids) == 512 and not local.model.rope.parts else 1)

    monkeypatch.setattr(LocalModel, "losses", broken)
    for _ in range(2):  # the second one finds the measurements of the first
        small_demo(max_minutes=10, out=tmp_path / "run")
        assert json.loads((tmp_path / "run" / "passage.json").read_text(encoding="utf-8"))["rope"] != "none"
    assert [row["rope"] for row in Run(tmp_path / "run").rows if row["loss"] is None] == ["none"]
