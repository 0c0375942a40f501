"""`ropewalk gpu-check`, whose parts run on the CPU here."""

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
    compared = [row for row in found["rows"] if "difference" in row]
    assert [(row["family"], row["dtype"], row["rope"]) for row in compared] == [
        (family, dtype, rope)
        for family in ("llama", "gemma2")
        for dtype in ("float32", "bfloat16")
        for rope in ("none", "rerope:20|logn")
    ]
    assert all(row["effect"] > 0.1 for row in compared if row["rope"] != "none")
    timed = [(row["engine"], row["rope"]) for row in found["rows"] if "prefill" in row]
    assert timed[:2] == [("transformers", "none"), ("ropewalk", "none")]
    assert len(timed) == 5
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
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(gpu_check, "_in_pieces", fails)
    check = GpuCheck("cpu", "tiny", [50], 60)
    check.run()
    assert check.failures == [{"part": "equality", "failed": "OutOfMemoryError: none left"}]
    assert any("prefill" in row for row in check.rows)


def test_a_gpu_that_the_engine_does_not_run_on_is_a_failure():
    check = GpuCheck("cuda", "tiny", [50], 0)
    check.rows = [{"part": "equality", "family": "llama", "engine": engine} for engine in (True, False)]
    assert check.failures == [check.rows[1]]


def test_it_stops_in_time():
    check = GpuCheck("cpu", "tiny", [50], 0)
    check.run()
    assert [row.get("stopped") for row in check.rows] == [None, "its time is used up"] * 2


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
