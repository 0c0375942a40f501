"""The tables of docs/engine.md, from lines that `ropewalk speed --against` printed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ropewalk.scaling import format_length

DOCS = Path(__file__).resolve().parent

RUNS = ("speed.jsonl", "results/speed-avx512-bf16.jsonl", "results/speed-amx.jsonl")

GGUF_RUN = "results/speed-avx512-gguf.jsonl"
"""One or more lines for each GGUF file, which both engines ran as it is."""

SAME_FORMAT = ("ropewalk bfloat16", "hf bfloat16", "llama.cpp bf16")
"""Engines whose weights are in the same format as ours. Others are not compared with."""


def tables() -> dict[str, str]:
    """The blocks of docs/engine.md."""
    return {"speed": "\n\n".join(_table(run) for run in runs()), "speed-gguf": _gguf_table()}


def runs() -> Iterator[dict[str, Any]]:
    """Every stored run of a model whose weights are in the same format in all engines."""
    for name in RUNS:
        yield from _lines(name)


def ratios(engine: str, what: str) -> list[float]:
    """How many times as fast ropewalk is, in all cells of an engine in `runs`: `what` is decode or prefill."""
    timings = [timing for run in runs() for timing in run["timings"]]
    return [t["ratio"]["median"] for t in timings if (t["engine"], t["what"]) == (engine, what)]


def _lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DOCS / name).read_text(encoding="utf-8").splitlines()]


def _table(run: dict[str, Any]) -> str:
    engines = {timing["engine"] for timing in run["timings"]}
    rows = _rows(run, {engine: engine for engine in SAME_FORMAT if engine in engines}, _columns(run))
    return "\n".join([*_heading(run), *rows, "", _below(run, run["model"])])


def _gguf_table() -> str:
    found = _lines(GGUF_RUN)
    lines = _heading(found[0])
    files: dict[str, dict[str, Any]] = {}
    for run in found:
        files.setdefault(run["model"], {"timings": []})["timings"] += run["timings"]
    for model, run in files.items():
        format_ = model.removesuffix(".gguf").rpartition(".")[2]
        engines = dict.fromkeys(timing["engine"] for timing in run["timings"])
        names = {engine: f"{engine.partition(' ')[0]} {format_}" for engine in engines}
        lines += _rows(run, names, _columns(found[0]))
    speeds = [run["bandwidth_gb_s"] for run in found]
    about = found[0] | {"bandwidth_gb_s": min(speeds)}
    return "\n".join([*lines, "", _below(about, "SmolLM2-135M", most=max(speeds))])


def _columns(run: dict[str, Any]) -> list[tuple[str, int]]:
    lengths = sorted({timing["length"] for timing in run["timings"]})
    return [(what, length) for what in ("decode", "prefill") for length in lengths]


def _heading(run: dict[str, Any]) -> list[str]:
    titles = [f"{what} at {format_length(length)}" for what, length in _columns(run)]
    return [f"| tokens a second | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]


def _rows(run: dict[str, Any], engines: dict[str, str], columns: list[tuple[str, int]]) -> list[str]:
    """A line of the table for each of `engines`, which have names there. What was not measured is empty."""
    cells = {(t["engine"], t["what"], t["length"]): _speed(t) for t in run["timings"]}
    return [
        f"| {name} | {' | '.join(cells.get((engine, *column), '') for column in columns)} |"
        for engine, name in engines.items()
    ]


def _below(run: dict[str, Any], model: str, most: float | None = None) -> str:
    """The machine and versions. `most`: the fastest reading of memory, if there were several."""
    versions = []
    for package in ("transformers", "llama-cpp-python"):
        if package in run["versions"]:
            versions.append(f"{package} {run['versions'][package]}")
    network = run["versions"]["network"]
    products = "bfloat16" if "products of chunks in bfloat16" in network else "float32"
    amx = " by AMX" if "attention by AMX" in network else ""
    speed = f"{run['bandwidth_gb_s']:.0f}" + (f" to {most:.0f}" if most is not None else "")
    return (
        f"{run['cpu']}, {run['threads']} threads, memory reads {speed} GB/s; {model}, prompts with {products} "
        f"products{amx}; {', '.join(versions)}."
    )


def _speed(timing: dict[str, Any]) -> str:
    share, median = timing["memory_share"], timing["speed"]["median"]
    speed = f"{median:.3g}" if median < 1000 else f"{median:,.0f}"
    if timing["engine"].startswith("ropewalk"):
        return f"**{speed}**" + (f" ({share:.0%})" if share is not None else "")
    return f"{speed} ({timing['ratio']['median']:.2g}x)"
