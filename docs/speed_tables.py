"""The tables of docs/engine.md, from lines that `ropewalk speed --against` printed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ropewalk.scaling import format_length

DOCS = Path(__file__).resolve().parent

RUNS = ("speed.jsonl", "results/speed-avx512-bf16.jsonl")

OURS = "ropewalk bfloat16"

SAME_FORMAT = ("ropewalk bfloat16", "hf bfloat16", "llama.cpp bf16")
"""Engines whose weights are in the same format as ours. Others are not compared with."""


def tables() -> dict[str, str]:
    """The block of docs/engine.md."""
    return {"speed": "\n\n".join(_table(run) for run in runs())}


def runs() -> Iterator[dict[str, Any]]:
    """Every run that is stored."""
    for name in RUNS:
        for line in (DOCS / name).read_text(encoding="utf-8").splitlines():
            yield json.loads(line)


def ratios(engine: str, what: str) -> list[float]:
    """How many times as fast ropewalk is, in all stored cells of an engine: `what` is decode or prefill."""
    timings = [timing for run in runs() for timing in run["timings"]]
    return [t["ratio"]["median"] for t in timings if (t["engine"], t["what"]) == (engine, what)]


def _table(run: dict[str, Any]) -> str:
    cells = {(t["engine"], t["what"], t["length"]): t for t in run["timings"]}
    lengths = sorted({length for _, _, length in cells})
    columns = [(what, length) for what in ("decode", "prefill") for length in lengths]
    engines = [engine for engine in SAME_FORMAT if any(engine == name for name, _, _ in cells)]
    titles = [f"{what} at {format_length(length)}" for what, length in columns]
    lines = [f"| tokens a second | {' | '.join(titles)} |", "|---" * (len(columns) + 1) + "|"]
    for engine in engines:
        lines.append(f"| {engine} | {' | '.join(_speed(cells[engine, *column]) for column in columns)} |")
    versions = [f"transformers {run['versions']['transformers']}"]
    if "llama-cpp-python" in run["versions"]:
        versions.append(f"llama-cpp-python {run['versions']['llama-cpp-python']}")
    products = "bfloat16" if "products of chunks in bfloat16" in run["versions"]["network"] else "float32"
    return "\n".join(
        [
            *lines,
            "",
            f"{run['cpu']}, {run['threads']} threads, memory reads {run['bandwidth_gb_s']:.0f} GB/s; {run['model']}, "
            f"prompts with {products} products; "
            f"{', '.join(versions)}.",
        ]
    )


def _speed(timing: dict[str, Any]) -> str:
    share, speed = timing["memory_share"], f"{timing['speed']['median']:.3g}"
    if timing["engine"] == OURS:
        return f"**{speed}**" + (f" ({share:.0%})" if share is not None else "")
    return f"{speed} ({timing['ratio']['median']:.2g}x)"
