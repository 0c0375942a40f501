"""The tables of docs/interop.md, from docs/results/interop.json, which `make interop` writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOUND = Path(__file__).resolve().parent / "results" / "interop.json"
TITLES = {
    "transformers": "transformers",
    "transformers4": "transformers 4",
    "vllm": "vLLM",
    "llama.cpp": "llama.cpp",
}
OWN_FORMS = {"hf", "vllm", "llama.cpp"}
"""Groups of cases in the form that is meant for the engine."""


def tables() -> dict[str, str]:
    """Every table by the name of its block."""
    found = json.loads(FOUND.read_text(encoding="utf-8"))
    parts = {f"same-{model}": _same(found, model) for model in found["models"]}
    return parts | {
        "versions": _versions(found),
        "others": _others(found),
        "readings": _readings(found),
        "lengths": _lengths(found),
    }


def _versions(found: dict[str, Any]) -> str:
    lines = ["| engine | versions | run on |", "|---|---|---|"]
    for engine, own in found["versions"].items():
        named = ", ".join(f"{name} {version}" for name, version in own.items() if name != "date")
        lines.append(f"| {TITLES.get(engine, engine)} | {named} | {own['date']} |")
    return "\n".join(lines)


def _same(found: dict[str, Any], model: str) -> str:
    """One model: a row for each scaler and context, a column for each engine."""
    rows = [row for row in found["rows"] if row["model"] == model and row["group"] in OWN_FORMS]
    cells = {(row["scaler"], row["context"], row["engine"]): row for row in rows}
    engines = [engine for engine in TITLES if any(row["engine"] == engine for row in rows)]
    lines = [
        f"| scaler | tokens | it moves | {' | '.join(TITLES[e] for e in engines)} |",
        "|---" * (len(engines) + 3) + "|",
    ]
    for scaler, context in dict.fromkeys((row["scaler"], row["context"]) for row in rows):
        own = [cells.get((scaler, context, engine)) for engine in engines]
        moves = next((row["scaling_moves"] for row in own if row and row.get("scaling_moves")), None)
        shown = " | ".join("" if row is None else _cell(row) for row in own)
        lines.append(f"| `{_escaped(scaler)}` | {context} | {'' if moves is None else f'{moves:.2g}'} | {shown} |")
    return "\n".join(lines)


def _cell(row: dict[str, Any]) -> str:
    numbers = f"{row['max']:.0e}, {row['loss']:+.0e}"
    return numbers if row["same_text"] else f"{numbers}, other text"


def _others(found: dict[str, Any]) -> str:
    """What must come out different, and what must be the very same."""
    lines = ["| | model | tokens | largest difference |", "|---|---|---|---|"]
    for row in found["rows"]:
        if row["group"] == "counter":
            name = f"`{_escaped(row['scaler'])}` exported for transformers, served by vLLM: must differ"
            lines.append(f"| {name} | {row['model']} | {row['context']} | {row['max']:.2g} |")
    for row in found["quantized"]:
        name = "a q8_0 file rewritten under a scaler against one written under it, both in llama.cpp: must be 0"
        lines.append(f"| {name} | {row['model']} | {row['context']} | {row['max']:.2g} |")
    return "\n".join(lines)


def _readings(found: dict[str, Any]) -> str:
    lines = [
        "| `rope_parameters` | vLLM's table | as transformers | as `ropewalk explain` says |",
        "|---" * 4 + "|",
    ]
    for row in found["readings"]:
        marks = [{True: "yes", False: "**no**", None: ""}[row.get(key)] for key in ("as_transformers", "as_described")]
        lines.append(f"| {row['config']} | {row['vllm']} | {' | '.join(marks)} |")
    return "\n".join(lines)


def _lengths(found: dict[str, Any]) -> str:
    """The models that vLLM serves at another length than `max_position_embeddings`, or than is said; the others in one
    line."""
    lines = [
        "| model | `max_position_embeddings` | vLLM serves | `ropewalk explain` says |",
        "|---" * 4 + "|",
    ]
    rows = found["lengths"]
    shown = [row for row in rows if not row["vllm"] == row["described"] == row["promised"]]
    for row in shown:
        lines.append(f"| {row['model']} | {row['promised']} | {row['vllm']} | {row['described']} |")
    lines.append(f"| {len(rows) - len(shown)} others | as in the config | the same | the same |")
    return "\n".join(lines)


def _escaped(spec: str) -> str:
    return spec.replace("|", "\\|")
