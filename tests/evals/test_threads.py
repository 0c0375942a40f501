"""Measurements in one thread while requests of another share the model: each waits for the other."""

import threading

import pytest
import torch

import ropewalk as rw
from ropewalk.evals.continuation.benchmark import measure
from ropewalk.evals.data import load_text
from ropewalk.evals.models.local import LocalModel
from ropewalk.evals.retrieval.task import Place, assemble
from ropewalk.evals.retrieval.tasks import TASKS
from ropewalk.evals.runs.result import Run
from ropewalk.evals.tuning.text import SkimCell, TuneText
from ropewalk.scaling import parse
from ropewalk.tokenizer_tools import cuts

IDS = [i % 200 + 3 for i in range(500)]
SPEC = "dynamic-yarn"  # so that every length asks for frequencies of its own


@pytest.fixture(scope="module")
def model(tiny_folder):
    return rw.load(tiny_folder, dtype="float32", max_length=2**31)


@pytest.fixture(autouse=True)
def under(model):
    model.rope = SPEC
    yield
    model.rope = None


@pytest.fixture
def disturbed(model, monkeypatch):
    """At every step of the network another thread asks for texts of other lengths and scalers, if it gets the lock."""

    def other():
        if model._lock.acquire(blocking=False):  # the thread that measures waits for this one
            before, model.rope = model.rope, "linear:8"
            model.generate_ids([5, 6, 7], rw.SamplingParams(max_new_tokens=1))
            model.rope = before
            with model.running(5000):
                pass
            model._lock.release()

    def disturb():
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()

    def begin():
        for name in ("forward", "skim", "new_cache"):
            own = getattr(model._runner, name)
            monkeypatch.setattr(model._runner, name, lambda *a, own=own, **k: (disturb(), own(*a, **k))[1])

    return begin


def no_progress(past, count):
    pass


def run_trial(model, tmp_path):
    place = Place(context=500, depth=0.5, text=None)
    return LocalModel(model).run_trial(assemble(TASKS["passkey"], model.tokenizer, place, 0)).logprobs


def logits(model, tmp_path):
    return torch.cat(list(LocalModel(model).logits(IDS, 400, no_progress))).tolist()


def skim(model, tmp_path):
    texts = TuneText(model, load_text("shakespeare"), 1024, searches=False)
    cell = texts.skim(parse(SPEC), texts.windows[0])
    assert isinstance(cell, SkimCell)
    return cell.measure(LocalModel(model), Run(tmp_path), no_progress)[0]["loss"]


def continuation(model, tmp_path):
    [cut] = cuts.draw(model.vocabulary, "def first(one):\n    return one.second\n" * 40, cuts.INSIDE, 1, 0)
    return [found["bits_per_byte"] for method, found in measure(model, cut).items() if "bits_per_byte" in found]


@pytest.mark.parametrize("work", [run_trial, logits, skim, continuation])
def test_another_threads_request_does_not_come_between(model, disturbed, work, tmp_path):
    with torch.inference_mode():
        alone = work(model, tmp_path / "alone")
        disturbed()
        assert work(model, tmp_path / "disturbed") == alone
