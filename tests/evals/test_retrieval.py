"""Retrieval cells against plain transformers, stand-ins that know everything or nothing, and the commands."""

import json
import math
import re

import pytest
import torch
from click.testing import CliRunner

import ropewalk as rw
from ropewalk.cli.main import cli
from ropewalk.evals.data import Text
from ropewalk.evals.models.fake import Oracle, replace_runner
from ropewalk.evals.models.local import LocalModel
from ropewalk.evals.retrieval.cells import cells, rebuild
from ropewalk.evals.retrieval.task import Place, Trial, assemble
from ropewalk.evals.retrieval.tasks import RULER, SUITES, TASKS
from ropewalk.evals.runs.result import Run
from ropewalk.scaling import parse

STORY = Text(name="story", documents=("A ship went out to sea. It had a crew of nine. " * 300,), sha256="cd" * 32)


@pytest.fixture(scope="module")
def model(tiny_folder):
    return rw.load(tiny_folder, max_length=2**31, compile=False)


@pytest.fixture(autouse=True)
def untouched(model):
    yield
    model.rope = None


def trial_of(model, name="passkey", length=400, seed=0):
    task = TASKS[name]
    place = Place(context=length, depth=0.5 if task.has_depth else None, text=STORY if task.needs_text else None)
    return assemble(task, model.tokenizer, place, seed)


def measure(model, run, names=("passkey",), spec="none", **options):
    rows = []
    planned = cells(
        LocalModel(model),
        [TASKS[name] for name in names],
        [parse(spec)],
        **{"contexts": [400], "depths": [0.5], **options},
    )
    for cell in planned:
        model.rope = cell.scaler
        rows += cell.measure(LocalModel(model), run, lambda past, count: None)
    assert len(rows) == sum(len(cell.seeds) for cell in planned)
    return rows


@pytest.mark.parametrize("spec", ["none", "yarn:4", "dynamic-ntk", "rerope:100"])
def test_scores_are_those_of_plain_transformers(model, spec):
    trial = trial_of(model, length=600)
    model.rope = spec
    heard = LocalModel(model).run_trial(trial)
    model.rope = None
    fixed = {"length": len(trial.prompt_ids) + trial.new_tokens} if parse(spec).depends_on_length else {}
    with rw.patch(model.hf, spec, **fixed), torch.inference_mode():
        ids = torch.tensor([trial.prompt_ids + trial.answer_ids])
        laws = model.hf(ids, use_cache=False).logits[0].double().log_softmax(-1)
        start = len(trial.prompt_ids)
        expected = [float(laws[start + n - 1, token]) for n, token in enumerate(trial.answer_ids)]
        written = []
        while len(written) < trial.new_tokens:
            now = torch.tensor([trial.prompt_ids + written])
            written.append(int(model.hf(now, use_cache=False).logits[0, -1].argmax()))
    assert heard.logprobs == pytest.approx(expected, abs=2e-4)
    likeliest = [int(laws[start + n - 1].argmax()) for n in range(len(trial.answer_ids))]
    assert heard.is_likeliest == (likeliest == trial.answer_ids)
    assert heard.written == model.tokenizer.decode(written)


def test_the_prompt_is_read_once(model, monkeypatch):
    trial, read = trial_of(model), []
    forward = model._runner.forward
    monkeypatch.setattr(
        model._runner, "forward", lambda ids, *rest, **more: read.append(len(ids)) or forward(ids, *rest, **more)
    )
    LocalModel(model).run_trial(trial)
    assert sum(read) == len(trial.prompt_ids) + len(trial.answer_ids) - 1 + trial.new_tokens


@pytest.mark.parametrize("spec", ["none", "yarn:4", "dynamic-ntk", "rerope:100"])
@pytest.mark.parametrize("settings", [{"compile": False}, {"precision": "bfloat16"}], ids=["modules", "bfloat16"])
def test_what_the_last_prompt_began_with_is_not_read_again_and_nothing_changes(tiny_folder, spec, settings):
    model = rw.load(tiny_folder, spec, max_length=2**31, **settings)
    trials = [trial_of(model, length=length, seed=seed) for length, seed in ((3000, 0), (3000, 1), (2900, 2), (400, 3))]
    alone = [LocalModel(model).run_trial(trial) for trial in trials]
    together, answers, begun_with = LocalModel(model), [], []
    for trial in trials:
        steps = []
        answers.append(together.run_trial(trial, lambda past, count, steps=steps: steps.append((past, count))))
        assert sum(count for _, count in steps) == len(trial.prompt_ids) + len(trial.answer_ids) - 1
        begun_with.append(steps[0][1])
    assert answers == alone
    assert len(trials[0].prompt_ids) == len(trials[1].prompt_ids)  # so that a scaler of the length is the same
    assert begun_with == [0, 1024, 0 if parse(spec).depends_on_length else 1024, 0]


def test_a_cache_that_cannot_forget_is_not_gone_on_from(model, monkeypatch):
    trial = trial_of(model)
    whole = LocalModel(model).run_trial(trial)
    monkeypatch.setattr("ropewalk.evals.models.local.can_rewind", lambda cache: False)
    assert LocalModel(model).run_trial(trial) == whole


@pytest.fixture(scope="module")
def replaced(tiny_folder):
    """Models by what stands in for their network, with the stand-in."""
    models = {kind: rw.load(tiny_folder, max_length=2**31, compile=False) for kind in ("oracle", "uniform")}
    return {kind: (model, replace_runner(model, kind)) for kind, model in models.items()}


@pytest.mark.parametrize("name", TASKS)
def test_an_oracle_is_always_right_and_a_uniform_network_exactly_uniform(tiny_folder, replaced, tmp_path, name):
    for kind, (model, stand_in) in replaced.items():
        before = {"before": stand_in.learn} if isinstance(stand_in, Oracle) else {}
        rows = measure(model, Run(tmp_path / kind), [name], contexts=[4000], trials=2, text=STORY, **before)
        for row in rows:
            assert row["model"] == f"{tiny_folder} replaced by {kind}"
            if kind == "oracle":
                assert row["correct"] == 1
                assert row["answer_logprob"] == 0
                assert row["answer_is_likeliest"]
            elif "choice_margin" in row:
                counts = sorted(map(len, rebuild(row, model.tokenizer, STORY).choices))
                shares = {counts[0]: 1 / counts.count(counts[0])}  # the likeliest choices are the shortest
                assert row["correct"] == shares.get(row["answer_tokens"], 0)
                assert row["correct_written"] == 0
            else:
                assert row["correct"] == 0
            if kind == "uniform":
                assert row["answer_logprob"] == pytest.approx(-row["answer_tokens"] * math.log(1024), rel=1e-6)
                assert not row["answer_is_likeliest"]


def test_an_oracle_that_is_asked_something_else_objects(tiny_folder):
    model = rw.load(tiny_folder, max_length=2**31, compile=False)
    replace_runner(model, "oracle").learn(trial_of(model, seed=1))
    with pytest.raises(AssertionError, match="differ from the trial's"):
        LocalModel(model).run_trial(trial_of(model, seed=2))


def test_rows_hold_what_was_asked_and_what_came_out(model, tmp_path):
    run = Run(tmp_path)
    (row,) = measure(model, run, ["niah"], "yarn:4", contexts=[700], trials=1, text=STORY)
    trial = rebuild(row, model.tokenizer, STORY)
    assert row["prompt_tokens"] == len(trial.prompt_ids) <= 700 - trial.new_tokens
    assert (row["suite"], row["task"], row["rope"], row["context"]) == ("niah", "niah", "yarn:4", 700)
    assert (row["depth"], row["seed"], row["trained_length"]) == (0.5, 0, 256)
    assert (row["text"], row["text_sha256"]) == ("story", STORY.sha256)
    assert row["actual_depth"] == trial.depth
    assert row["answer"] in trial.prompt
    assert row["answer_logprob_per_token"] * row["answer_tokens"] == pytest.approx(row["answer_logprob"])
    assert row["correct"] == TASKS["niah"].mark(row["generated"], trial.answers)
    assert row["seconds"] > 0


def test_a_run_goes_on_where_it_was(model, tmp_path, monkeypatch):
    run = Run(tmp_path)
    measure(model, run, trials=2)
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    asked, run_trial = [], LocalModel.run_trial
    monkeypatch.setattr(LocalModel, "run_trial", lambda *rest: asked.append(1) or run_trial(*rest))
    rows = measure(model, Run(tmp_path), trials=4)
    assert len(asked) == 2
    assert [row["seed"] for row in rows] == [0, 1, 2, 3]
    assert (tmp_path / "results.jsonl").read_text().splitlines()[:2] == lines
    for line in lines:
        first = json.loads(line)
        again = measure(model, Run(tmp_path / "new"), trials=2)[first["seed"]]
        timing = {"seconds", "peak_memory_mb"}
        assert {k: v for k, v in again.items() if k not in timing} == {
            k: v for k, v in first.items() if k not in timing
        }


def test_cells_come_scaler_by_scaler_and_mistakes_are_told(model):
    planned = cells(
        LocalModel(model),
        [TASKS["passkey"], TASKS["kv"]],
        [parse("none"), parse("yarn:4")],
        contexts=[600, 800],
        depths=[0, 1],
        trials=3,
    )
    assert [(str(c.scaler), c.context) for c in planned] == sorted(
        ((str(c.scaler), c.context) for c in planned), key=lambda pair: (pair[0] != "none", pair[1])
    )
    assert len(planned) == 16
    assert planned[1].label == "600 passkey depth 1"
    with pytest.raises(rw.ConfigError, match=r"depth 1.5 must lie between 0 .* and 1"):
        cells(LocalModel(model), [TASKS["passkey"]], [parse("none")], contexts=[600], depths=[1.5])
    with pytest.raises(rw.ConfigError, match="passkey needs the depth of its needle; give at least one"):
        cells(LocalModel(model), [TASKS["niah_single_1"], TASKS["passkey"]], [parse("none")], contexts=[900])
    with pytest.raises(rw.DataError, match="the shortest prompt"):
        cells(LocalModel(model), [TASKS["kv"]], [parse("none")], contexts=[50], depths=[1])


def test_a_length_that_holds_the_prompts_of_some_seeds_only_is_refused(model):
    """The smallest prompts of many-shot take 92 to 119 tokens."""
    task, shared = TASKS["many-shot"], {"contexts": [105], "trials": 20}
    assert len(assemble(task, model.tokenizer, Place(context=105), 0).prompt_ids) < 105
    with pytest.raises(rw.DataError, match=r"the shortest prompt .* give a length of at least 1\d\d"):
        cells(LocalModel(model), [task], [parse("none")], **shared)


@pytest.mark.parametrize(("names", "trials"), [(["many-shot"], 20), (["many-shot", "passkey", "kv"], 2)])
def test_the_length_that_a_refusal_names_is_enough_for_all(model, names, trials):
    tasks, shared = [TASKS[name] for name in names], {"depths": [0, 1], "trials": trials}
    for context in range(40, 90, 10):
        with pytest.raises(rw.DataError, match="give a length of at least") as refused:
            cells(LocalModel(model), tasks, [parse("none")], contexts=[context], **shared)
        enough = int(re.search(r"at least (\d+)", str(refused.value))[1])
        cells(LocalModel(model), tasks, [parse("none")], contexts=[enough], **shared)


def ropewalk(*arguments):
    return CliRunner().invoke(cli, [*map(str, arguments)], catch_exceptions=False)


def test_the_command_measures_reports_and_resumes(tiny_folder, tmp_path, request):
    out = tmp_path / "run"
    options = (tiny_folder, "--rope", "none", "--rope", "yarn:4", "--lengths", "300,2x", "--depths", "0,1")
    arguments = ("passkey", *options, "--no-compile", "--trials", 1, "--out", out)
    assert "8 cells" in ropewalk(*arguments, "--dry-run").output
    assert not out.exists()
    shown = ropewalk(*arguments).output
    assert "warning: cells of one length and depth or task have as few as 1 trials" in " ".join(shown.split())
    rows = Run(out).rows
    assert len(rows) == 8
    for file in ("table.md", "table.csv", "report.html", "passkey_heat.png", "passkey_heat.svg", "passkey_curve.png"):
        assert (out / file).stat().st_size > 100
    assert str(out / "passkey_curve.svg") in shown
    request.getfixturevalue("no_plots")
    ropewalk(*arguments)
    assert Run(out).rows == rows


def test_ruler_by_command(tiny_folder, no_plots, tmp_path):
    out = tmp_path / "run"
    text = tmp_path / "text.txt"
    text.write_text(STORY.documents[0])
    arguments = (
        "ruler",
        tiny_folder,
        "--fake",
        "oracle",
        "--lengths",
        "6k",
        "--trials",
        1,
        "--text",
        text,
        "--out",
        out,
    )
    shown = ropewalk(*arguments).output
    assert "RULER-11, offline" in shown
    assert {row["task"] for row in Run(out).rows} == {*SUITES[RULER]}
    assert "100%" in (out / "table.md").read_text()
    with pytest.raises(rw.ConfigError, match="Did you mean 'vt'"):
        ropewalk("ruler", tiny_folder, "--tasks", "vtt")
    with pytest.raises(rw.ConfigError, match="must be numbers from 0 to 1"):
        ropewalk("passkey", tiny_folder, "--depths", "0,a")


@pytest.mark.model
def test_the_real_model_finds_a_passkey(tmp_path):
    real = rw.load("smollm2-135m", max_length=2**31)
    rows = measure(real, Run(tmp_path), contexts=[512], trials=1)
    assert [row["correct"] for row in rows] == [1]
    assert all(row["answer_logprob_per_token"] > -1 for row in rows)


def test_a_trial_is_run_beyond_what_the_scaler_reaches(tiny_folder):
    """`tune` asks for passkeys under the untouched model too, where it is among the best."""
    model = LocalModel(rw.load(tiny_folder))
    ids = model.model.vocabulary.encode("def walk(top):\n" * 60)
    assert len(ids) > model.trained_length
    trial = Trial(prompt="", prompt_ids=ids, answer_ids=ids[:2], answers=("x",), target="x", new_tokens=4, needle=None)
    output = model.run_trial(trial)
    assert len(output.logprobs) == 2
    params = rw.SamplingParams(max_new_tokens=4, temperature=0)
    assert output.written == rw.load(tiny_folder, max_length=2048).generate_ids(ids, params).text
