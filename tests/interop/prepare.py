"""Exports every case to a work folder, once: python prepare.py WORK."""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cases import FROZEN, MODELS, QUANTIZED, SERVED, STATIC, TUNED, Model, model_path, scaler
from configs import CONFIGS
from work import BUILT_IN, GREEDY, QUANTIZED_MODEL, Case, quantized_file, write_cases

import ropewalk as rw
from ropewalk.engine.checkpoints.assets import fetch_files
from ropewalk.evals.data import load_text, tokenize_documents

TEXT = "kjv"
FORMS = {"hf": "hf", "vllm": "vllm", "llama.cpp": "llama.cpp"}


def slug(name: str) -> str:
    """A scaler's name as part of a file name."""
    return re.sub(r"[^a-z0-9.]+", "-", name)


def wanted() -> Iterator[tuple[str, str, str]]:
    """(model, scaler, group) of every case."""
    for model in MODELS:
        for name in SERVED:
            yield from ((model, name, group) for group in FORMS)
        yield model, TUNED, "counter"  # the form for transformers, given to vLLM
    yield from (("tiny", name, "hf") for name in (*STATIC, *FROZEN))
    yield "tiny", "dynamic-yarn", "vllm"


def lengths(model: Model, name: str, group: str, reach: int) -> tuple[int, ...]:
    """Tokens of the texts to be read."""
    is_far = model.far is None or (name in model.far and group != "counter")
    return tuple(
        n
        for n in (model.within, model.beyond)
        if (n == model.within or is_far) and (group == "hf" or n + GREEDY <= reach)
    )


def export(work: Path, label: str, name: str, group: str) -> Case:
    """Write one case."""
    model = MODELS[label]
    target: Any = FORMS.get(group, "hf")
    out = work / "exports" / (f"{group}-{label}-{slug(name)}" + (".gguf" if target == "llama.cpp" else ""))
    done = rw.export(
        model_path(model),
        out,
        target=target,
        rope=scaler(name, model.dim),
        length="4x" if name in FROZEN else None,
        dtype="f32" if target == "llama.cpp" else None,
    )
    return Case(
        model=label,
        scaler=name,
        target=target,
        path=str(out),
        lengths=lengths(model, name, group, done.length),
        reference=f"{label}-{slug(name)}",
        group=group,
    )


def export_quantized(work: Path, label: str) -> list[Case]:
    """A q8_0 file written under a scaler at once, and one rewritten from a file without."""
    model, folder, options = model_path(MODELS[label]), work / "exports", {"target": "llama.cpp", "dtype": "q8_0"}
    paths = {kind: folder / f"{slug(kind)}-{label}.gguf" for kind in ("q8_0 at once", "q8_0 rewritten")}
    plain = folder / f"q8_0-{label}.gguf"
    rw.export(model, paths["q8_0 at once"], rope=QUANTIZED, **options)
    rw.export(model, plain, rope="none", **options)
    rw.export(plain, paths["q8_0 rewritten"], rope=QUANTIZED, target="llama.cpp")
    return [
        Case(
            model=label,
            scaler=QUANTIZED,
            target="llama.cpp",
            path=str(path),
            lengths=(MODELS[label].within,),
            reference=f"{label}-{slug(QUANTIZED)}",
            group=kind,
        )
        for kind, path in paths.items()
    ]


def link_built_in(work: Path) -> None:
    """Make the file of the built-in model known to the other engines."""
    link = quantized_file(work, BUILT_IN)
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.exists():
        link.symlink_to(fetch_files(MODELS[QUANTIZED_MODEL].name))


def main() -> None:
    """Everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    work = parser.parse_args().work.resolve()
    link_built_in(work)
    if (work / "cases.json").exists():
        return
    shutil.rmtree(work / "exports", ignore_errors=True)  # of a run that was cut off
    work.mkdir(parents=True, exist_ok=True)
    ids = {}
    for label, model in MODELS.items():
        tokenizer = rw.load(model_path(model), dtype="float32").tokenizer
        ids[label] = tokenize_documents(load_text(TEXT), tokenizer, limit_tokens=model.beyond)[0]
    (work / "ids.json").write_text(json.dumps(ids), encoding="utf-8")
    (work / "configs.json").write_text(json.dumps(CONFIGS), encoding="utf-8")
    cases = [export(work, *one) for one in wanted()]
    for label in MODELS:
        cases += export_quantized(work, label)
    write_cases(work, cases)


if __name__ == "__main__":
    main()
