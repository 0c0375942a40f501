"""Compares what the engines found with ropewalk, and writes docs/results/interop.json: python report.py WORK."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import MODELS
from configs import CONFIGS, HEAD_DIM, MAX_LENGTH
from work import Case, load, read_cases

from ropewalk.errors import RopewalkError
from ropewalk.scaling.engine_reading import EngineReading
from ropewalk.scaling.serving import read_all

OUT = Path(__file__).resolve().parents[2] / "docs" / "results" / "interop.json"
SERVED = Path(__file__).resolve().parents[1] / "data" / "served.json"
ENGINES = {
    "transformers": ("hf",),
    "transformers4": ("hf",),
    "vllm": ("vllm", "counter"),
    "llama.cpp": ("llama.cpp", "q8_0 at once", "q8_0 rewritten"),
}
"""The groups of cases that each engine reads."""

LIMIT = 1e-6
"""For each token of the text, of a difference between log-probabilities that is rounding: an angle is a position times
a frequency in float32. What a scaler does is a hundred times that."""


def compared(work: Path, engine: str, case: Case, length: int) -> dict[str, Any] | None:
    """One row: an engine and ropewalk on one text."""
    own, other = load(work, "ropewalk", case.reference, length), load(work, engine, case.name, length)
    if own is None or other is None:
        return None
    row = {
        "engine": engine,
        "model": case.model,
        "scaler": case.scaler,
        "group": case.group,
        "context": length,
        "max": _largest(own, other),
        "loss": float(other["logprobs"].mean() - own["logprobs"].mean()),
        "same_text": same_text(own["written"], other["written"]),
    }
    plain = load(work, "ropewalk", f"{case.model}-none", length)
    return row | ({"scaling_moves": _largest(own, plain)} if plain is not None else {})


def _largest(one: dict[str, Any], other: dict[str, Any]) -> float:
    return float(np.abs(one["logprobs"] - other["logprobs"]).max())


def same_text(own: Any, other: Any) -> bool:
    """True if both wrote the same; ropewalk ends before the token that ends a text, others may go on."""
    return bool(np.array_equal(own, other[: len(own)]))


def quantized(work: Path, cases: list[Case]) -> list[dict[str, Any]]:
    """A file in q8_0 written under a scaler, and one written without and then rewritten."""
    rows = []
    for at_once in (case for case in cases if case.group == "q8_0 at once"):
        again = next(case for case in cases if case.group == "q8_0 rewritten" and case.model == at_once.model)
        for length in at_once.lengths:
            pair = [load(work, "llama.cpp", case.name, length) for case in (at_once, again)]
            if pair[0] is not None and pair[1] is not None:
                one, other = pair
                rows.append({"model": at_once.model, "context": length, "max": _largest(one, other)})
    return rows


def readings(work: Path) -> Iterator[dict[str, Any]]:
    """vLLM's own tables beside what `ropewalk.scaling.serving` says that it computes, and beside transformers."""
    file = work / "vllm-readings.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for name, theirs in found.items():
        said = {one.engine: one for one in _said(CONFIGS[name])}
        row = {"config": name, "vllm": "refused" if "refused" in theirs else f"m {theirs['m']:.4f}"}
        if said:
            row["as_described"] = holds(theirs, said["vLLM"])
            row["as_transformers"] = holds(theirs, said["transformers"])
        yield row


def lengths(work: Path) -> Iterator[dict[str, Any]]:
    """What vLLM serves of real models' configs, beside what `ropewalk explain` says that it serves."""
    file = work / "vllm-lengths.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    models = json.loads(SERVED.read_text(encoding="utf-8"))
    for name, theirs in found.items():
        said = {one.engine: one.max_length for one in read_all(models[name]["config"])}
        yield {"model": name, "promised": said["transformers"], "vllm": theirs, "described": said["vLLM"]}


def _said(parameters: dict[str, Any]) -> list[EngineReading]:
    config = {
        "model_type": "llama",
        "head_dim": HEAD_DIM,
        "hidden_size": 4 * HEAD_DIM,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_LENGTH,
        "rope_parameters": parameters,
    }
    try:
        return read_all(config)
    except RopewalkError as error:
        print(f"not read here: {error}")
        return []


def holds(theirs: dict[str, Any], said: EngineReading) -> bool:
    """True if an engine's table is what a reading says for texts of every length."""
    if said.scaler is None or "refused" in theirs:
        return said.scaler is None and "refused" in theirs
    wanted = torch.tensor(theirs["inv_freq"], dtype=torch.float64)
    for length in (1, MAX_LENGTH, 2 * MAX_LENGTH):
        ours = said.scaler.frequencies(said.rope, length)
        if not torch.allclose(ours.inv_freq, wanted, rtol=1e-5, atol=1e-9):
            return False
        if not math.isclose(ours.attention_factor, theirs["m"], rel_tol=1e-6):
            return False
    return True


def failures(found: dict[str, Any]) -> Iterator[str]:
    """What is not as it was promised."""
    for row in found["rows"]:
        if row["group"].startswith("q8_0"):
            continue
        is_same = row["max"] < LIMIT * row["context"]
        if is_same == (row["group"] == "counter"):
            what = f"{row['engine']}, {row['model']} under {row['scaler']} at {row['context']}"
            yield f"{what}: {row['max']:.2g}, {'the same, against expectation' if is_same else 'not the same'}"
    for row in found["quantized"]:
        if row["max"] != 0:
            yield f"rewritten q8_0, {row['model']}: {row['max']:.2g}, not the same bits"
    for row in found["readings"]:
        if not row["as_described"]:
            yield f"vLLM's table for {row['config']} is not as scaling/serving.py describes it"

    for row in found["lengths"]:
        if row["vllm"] != row["described"]:
            yield f"vLLM serves {row['vllm']} tokens of {row['model']}; scaling/engine_reading.py: {row['described']}"


def main() -> None:
    """Everything that was found; fails if something is not as it was promised."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    work = parser.parse_args().work
    cases = read_cases(work)
    rows = []
    for engine, groups in ENGINES.items():
        for case in cases:
            if case.group in groups:
                rows += [row for n in case.lengths if (row := compared(work, engine, case, n)) is not None]
    versions = {}
    for engine in ("ropewalk", *ENGINES):
        file = work / f"{engine}.json"
        versions[engine] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    models = {
        label: {"name": model.name, "within": model.within, "beyond": model.beyond} for label, model in MODELS.items()
    }
    found = {
        "versions": versions,
        "models": models,
        "rows": rows,
        "quantized": quantized(work, cases),
        "readings": list(readings(work)),
        "lengths": list(lengths(work)),
    }
    OUT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"{len(rows)} comparisons: {OUT}")
    if wrong := list(failures(found)):
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
