"""Runs made of synthetic losses: every method scores the same tokens, whose difficulty is common to all."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import prepared
import pytest
from drawings import overlaps

from ropewalk.evals.reports import style
from ropewalk.evals.runs.result import Run
from ropewalk.evals.statistics import block_interval

K = 1024
TRAINED = 8 * K

MakeRun = Callable[..., Run]

SMOLLM2 = {
    "none": {2: 3.53, 8: 3.48, 10: 3.48, 16: 6.1, 24: 7.5},
    "linear:2": {2: 4.25, 8: 4.20, 10: 4.19, 16: 4.16, 24: 7.9},
    "yarn:2": {2: 3.54, 8: 3.485, 10: 3.49, 16: 3.49, 24: 5.9},
    "rerope:4k|logn": {2: 3.53, 8: 3.48, 10: 3.48, 16: 3.47},
}


def fill(folder: Path, losses: Mapping[str, Mapping[int, float | None]], **recipe: Any) -> Run:
    """A run with mean loss `losses[rope][thousands of tokens]`; None is a cell that ran out of memory."""
    run = Run(folder)
    rng = np.random.default_rng(7)
    tokens = recipe.get("target", 1024)
    difficulty = rng.gamma(1.2, 1.0, tokens)
    for rope, by_context in losses.items():
        for thousands, loss in by_context.items():
            cell = {
                "task": "ppl",
                "protocol": "fixed-target",
                "model": "toy",
                "rope": rope,
                "context": int(thousands * K),
                "target": tokens,
                "bucket_start": None,
                "bucket_end": None,
                "samples": 1,
                "text": "novel",
                "text_sha256": "ab" * 32,
                "dtype": "float32",
                "device": "cpu",
                "trained_length": TRAINED,
                "places": "0:24576",
            } | recipe
            if loss is None:
                run.add(cell, {"loss": None, "reason": "out of memory"})
                continue
            per_token = difficulty + rng.normal(0, 0.05, tokens)
            per_token = (per_token - per_token.mean() + loss).astype(np.float32)
            low, high = block_interval(per_token)
            measured = {
                "tokens": tokens,
                "documents": 1,
                "loss": loss,
                "loss_low": low,
                "loss_high": high,
                "perplexity": math.exp(loss),
                "bits_per_byte": loss / math.log(2) / 4,
                "seconds": 3.0 * thousands,
                "tokens_per_second": 340.0,
                "peak_memory_mb": 900.0,
            }
            run.add(cell, measured, per_token)
    return run


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """`make_run({rope: {thousands of tokens: loss}}, **recipe)`; a second call adds to the same folder."""
    return lambda losses, **recipe: fill(tmp_path / "run", losses, **recipe)


@pytest.fixture
def smollm_run(make_run: MakeRun) -> Run:
    """The shape of SmolLM2-135M: a baseline that breaks past 10k, and methods that hold more or less."""
    return make_run(SMOLLM2)


@pytest.fixture(scope="module")
def shared_smollm_run(tmp_path_factory) -> Run:
    """The same, to be left as it is."""
    return fill(tmp_path_factory.mktemp("smollm") / "run", SMOLLM2)


@pytest.fixture(autouse=True)
def _no_text_over_another(monkeypatch):
    """Whatever a test draws can be read."""
    save = style.save

    def checked(fig, out_stem):
        paths = save(fig, out_stem)
        assert overlaps(fig) == []
        return paths

    monkeypatch.setattr(style, "save", checked)


@pytest.fixture
def prepared_processes(monkeypatch):
    """New processes that have the libraries imported, for what reads no environment while they are."""
    monkeypatch.setattr("multiprocessing.get_context", lambda _: prepared.context)


@pytest.fixture
def llama_cpp():
    return pytest.importorskip("llama_cpp")
