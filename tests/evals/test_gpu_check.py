"""`ropewalk gpu-check`, whose parts run on the CPU here."""

import itertools
import json

import pytest
import torch
from click.testing import CliRunner

import ropewalk as rw
from ropewalk.cli.main import cli
from ropewalk.engine.runners.family import FAMILIES
from ropewalk.evals.speed import gpu_check
from ropewalk.evals.speed.gpu_check import GpuCheck

pytestmark = pytest.mark.filterwarnings("ignore:.*some distances are longer than in training:UserWarning")


@pytest.fixture
def short(monkeypatch):
    """Two families and two scalers."""
    monkeypatch.setattr(gpu_check, "FAMILIES", ("llama", "gemma2"))
    monkeypatch.setattr(gpu_check, "SCALERS", ("none", "rerope:20|logn"))


def run(*arguments):
    return CliRunner().invoke(cli, ["gpu-check", *arguments], catch_exceptions=False)


@pytest.mark.usefixtures("short")
def test_all_parts_on_the_cpu():
    done = run("--device", "cpu", "--geometry", "tiny", "--lengths", "100", "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    compared = [row for row in found["rows"] if row["part"] == "equality" and "difference" in row]
    assert [(row["family"], row["dtype"], row["rope"]) for row in compared] == [
        (family, dtype, rope)
        for family in ("llama", "gemma2")
        for dtype in ("float32", "bfloat16")
        for rope in ("none", "rerope:20|logn")
    ]
    assert all(row["effect"] > 0.1 for row in compared if row["rope"] != "none")
    timed = [(row["engine"], row["rope"]) for row in found["rows"] if "prefill" in row]
    assert timed[:2] == [("ropewalk", "none"), ("transformers", "none")]
    assert len(timed) == 5
    forms = [(row["numbers"], row["rope"], row["form"]) for row in found["rows"] if "form" in row]
    assert forms == list(itertools.product(("own", "int8"), ("none", "rerope:20|logn"), ("rows", "tree")))
    assert [row["rows"] for row in found["rows"] if "rows" in row] == [8]
    assert found["machine"]["device"] == "cpu"
    for text in ("equality with float64", "100", "8 rows"):
        assert text in done.stderr


@pytest.mark.usefixtures("short")
def test_a_wrong_engine_is_found(monkeypatch):
    choose = gpu_check.choose_runner

    def wrong(hf, sites, options):
        runner = choose(hf, sites, options)
        forward = runner.forward
        runner.forward = lambda ids, cache, count: forward(ids, cache, count) * 1.2
        return runner

    monkeypatch.setattr(gpu_check, "choose_runner", wrong)
    done = run("--device", "cpu", "--geometry", "tiny", "--lengths", "50")
    assert done.exit_code == 1
    assert "wrong: {'part': 'equality', 'family': 'llama'" in done.stdout


@pytest.mark.usefixtures("short")
def test_a_part_that_fails_does_not_stop_the_rest(monkeypatch):
    def fails(*_):
        raise ValueError("wrong")

    in_pieces, calls = gpu_check._in_pieces, iter([fails])
    monkeypatch.setattr(gpu_check, "_in_pieces", lambda *arguments: next(calls, in_pieces)(*arguments))
    monkeypatch.setattr(GpuCheck, "_forms", lambda _: (row for row in ()))
    check = GpuCheck("cpu", "tiny", [50], 60)
    monkeypatch.setattr(check, "_of_transformers", fails)
    check.run()
    assert check.failures == [
        {"part": "equality", "family": "llama", "failed": "ValueError: wrong"},
        {"part": "speed", "engine": "transformers", "length": 50, "rope": "none", "failed": "ValueError: wrong"},
    ]
    assert {row["family"] for row in check.rows if "difference" in row} == {"gemma2"}
    assert [row["rope"] for row in check.rows if "prefill" in row] == ["none", *gpu_check._MAPS]


@pytest.mark.usefixtures("short")
def test_lack_of_memory_is_no_failure_and_the_next_is_tried(monkeypatch):
    def fails(*_):
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(GpuCheck, "_forms", lambda _: (row for row in ()))
    check = GpuCheck("cpu", "tiny", [50], 60)
    monkeypatch.setattr(check, "_of_transformers", fails)
    check._part("speed", 1.0, check._speed())
    assert not check.failures
    assert [row["engine"] for row in check.rows if row.get("no_memory")] == ["transformers"]
    assert [row["rope"] for row in check.rows if "prefill" in row] == ["none", *gpu_check._MAPS]
    assert "no memory" in str(list(gpu_check.tables(check)[1].columns[3].cells))


def test_a_gpu_that_the_engine_does_not_run_on_is_a_failure():
    check = GpuCheck("cuda", "tiny", [50], 0)
    check.rows = [{"part": "equality", "family": "llama", "engine": engine} for engine in (True, False)]
    assert check.failures == [check.rows[1]]


def test_it_stops_in_time():
    check = GpuCheck("cpu", "tiny", [50], 0)
    check.run()
    assert [row.get("stopped") for row in check.rows] == [None, "its time is used up"] * 3


@pytest.mark.parametrize("family", FAMILIES)
def test_a_scaler_acts_on_the_small_model_of_every_family(family):
    """A model on which it has no effect would not show that it is wrong."""
    hf, ids = gpu_check.small_model(family), torch.arange(1, 90)[None]
    with torch.inference_mode():
        before = hf(ids).logits
        with rw.patch(hf, "rerope:20"):
            after = hf(ids).logits
    assert float((after - before).norm() / before.norm()) > 0.01  # ten times the limit in float32


def test_no_gpu_and_unknown_names_are_refused():
    if not torch.cuda.is_available():
        done = CliRunner().invoke(cli, ["gpu-check"])
        assert "torch sees no GPU here" in str(done.exception)
    done = CliRunner().invoke(cli, ["gpu-check", "--device", "cpu", "--geometry", "llama"])
    assert "Did you mean" in str(done.exception)
