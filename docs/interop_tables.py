"""The tables of docs/export.md and docs/engine.md from what `make interop` writes into docs/results."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
FOUND, QUANTIZED = RESULTS / "interop.json", RESULTS / "quantized.json"
PLUGIN, SPEED = RESULTS / "vllm_plugin.json", RESULTS / "vllm_speed.json"
SERVED = RESULTS / "vllm-served" / "results.jsonl"
TITLES = {
    "transformers": "transformers",
    "transformers4": "transformers 4",
    "vllm": "vLLM",
    "llama.cpp": "llama.cpp",
}
OWN_FORMS = {"hf", "vllm", "llama.cpp"}
"""Groups of cases in the form that is meant for the engine."""


SHOWN_WHOLE = "smollm2"
"""The model of which every comparison is shown; of the others the largest differences."""


def tables() -> dict[str, str]:
    """Every table by the name of its block."""
    found = json.loads(FOUND.read_text(encoding="utf-8"))
    return {
        "engines": _versions(found),
        "same": _same(found, SHOWN_WHOLE),
        "largest": _largest(found),
        "others": _others(found),
        "explained": _explained(found),
        **_plugin_tables(json.loads(PLUGIN.read_text(encoding="utf-8"))),
        "plugin-served": _served([json.loads(line) for line in SERVED.read_text(encoding="utf-8").splitlines()]),
        "plugin-speed": _speed(json.loads(SPEED.read_text(encoding="utf-8"))["rows"]),
    }


def quantized_tables() -> dict[str, str]:
    """The block of docs/engine.md: what computing with quantized blocks changes."""
    found = json.loads(QUANTIZED.read_text(encoding="utf-8"))
    titles = {
        "blocks": "blocks, float32 arithmetic",
        "steps": "steps, float32 cache",
        "as loaded": "blocks, as loaded",
        "llama.cpp": "llama.cpp",
    }
    lines = [f"| file | formats | {' | '.join(titles.values())} |", "|---" * (2 + len(titles)) + "|"]
    for file in found["files"]:
        cells = [f"{file['ways'][how]['divergence']:.0e}, {file['ways'][how]['loss']:+.0e}" for how in titles]
        lines.append(f"| {file['file']} | {file['formats']} | {' | '.join(cells)} |")
    [precision] = {file["as_loaded"].removeprefix(f"{file['formats']}, ") for file in found["files"]}
    return {"quantized": "\n".join([*lines, "", f"{found['tokens']} tokens; as loaded: {precision}."])}


def _plugin_tables(rows: list[dict[str, Any]]) -> dict[str, str]:
    """vLLM with the plug-in: compared with patched models."""
    return {
        "plugin": _plugin([row for row in rows if row["group"] == "served"]),
        "plugin-ways": _plugin_ways([row for row in rows if row["group"] != "served"]),
    }


def _plugin(rows: list[dict[str, Any]]) -> str:
    """A row for each model and scaler, with all checks of it."""
    lines = ["| model | scaler | effect | log-probability | same text | from the prefix cache |", "|---" * 6 + "|"]
    for model, scaler in dict.fromkeys((row["model"], row["scaler"]) for row in rows):
        own = [row for row in rows if (row["model"], row["scaler"]) == (model, scaler)]
        largest = max(row["max"] for row in own if row["max"] is not None)
        same, texts = (sum(row[key] for row in own) for key in ("same_text", "requests"))
        cells = f"{model} | `{_escaped(scaler)}` | {_effect(own[0])} | {largest:.0e} | {same} of {texts}"
        lines.append(f"| {cells} | {sum(row['cached'] for row in own)} |")
    return "\n".join(lines)


def _effect(row: dict[str, Any]) -> str:
    return f"{row['effect']:.2g}" if "effect" in row else ""


def _plugin_ways(rows: list[dict[str, Any]]) -> str:
    """A row for each check in an engine with other options."""
    lines = ["| model | scaler | requests | log-probability | same text |", "|---" * 5 + "|"]
    for row in rows:
        largest = "" if row["max"] is None else f"{row['max']:.0e}"
        check = row["check"] + (f" ({row['preempted']})" if "preempted" in row else "")
        cells = f"{row['model']} | `{_escaped(row['scaler'])}` | {check} | {largest}"
        lines.append(f"| {cells} | {row['same_text']} of {row['requests']} |")
    return "\n".join(lines)


def _served(rows: list[dict[str, Any]]) -> str:
    """Losses at every length: of vLLM, and of ropewalk's engine under the same scaler and under none."""
    cells: dict[int, dict[str, float]] = {}
    for row in rows:
        way = "vLLM" if row["dtype"] == "served" else "ropewalk" if row["rope"] != "none" else "untouched"
        cells.setdefault(row["context"], {})[way] = row["loss"]
    lines = ["| tokens | vLLM with the plug-in | ropewalk | ropewalk, `none` |", "|---" * 4 + "|"]
    for context, losses in sorted(cells.items()):
        shown = (f"{losses[way]:.4f}" if way in losses else "" for way in ("vLLM", "ropewalk", "untouched"))
        lines.append(f"| {context} | {' | '.join(shown)} |")
    return "\n".join(lines)


def _speed(rows: list[dict[str, Any]]) -> str:
    """Tokens a second, and how many times those of the first row of the same length."""
    lines = ["| prompt | served by | prompt, tokens/s | | answer, tokens/s | |", "|---" * 6 + "|"]
    stock: dict[int, dict[str, Any]] = {}
    for row in rows:
        first = stock.setdefault(row["tokens"], row)
        way = row["way"] if row is first else f"plug-in, `{_escaped(row['way'])}`"
        cells = [f"{row[key]:.0f} | {row[key] / first[key]:.2f}x" for key in ("read", "written")]
        lines.append(f"| {row['tokens']} | {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


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
        f"| scaler | tokens | effect | {' | '.join(TITLES[e] for e in engines)} |",
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


def _largest(found: dict[str, Any]) -> str:
    """The other models: a row for each engine, with the largest difference over all scalers and contexts."""
    rows = [row for row in found["rows"] if row["model"] != SHOWN_WHOLE and row["group"] in OWN_FORMS]
    lines = ["| engine | scalers | texts | log-probability | mean loss | same tokens written |", "|---" * 6 + "|"]
    for engine, title in TITLES.items():
        cells = [row for row in rows if row["engine"] == engine]
        if cells:
            largest, loss = max(row["max"] for row in cells), max(abs(row["loss"]) for row in cells)
            scalers, same = len({row["scaler"] for row in cells}), sum(row["same_text"] for row in cells)
            lines.append(
                f"| {title} | {scalers} | {len(cells)} | {largest:.0e} | {loss:.0e} | {same} of {len(cells)} |"
            )
    return "\n".join(lines)


def _others(found: dict[str, Any]) -> str:
    """What must come out different, and what must be the very same."""
    different = min(row["max"] for row in found["rows"] if row["group"] == "counter")
    same = max(row["max"] for row in found["quantized"])
    return (
        f"- `tuned` exported for transformers and served by vLLM must differ: by at least {different:.2g}.\n"
        "- A q8_0 file rewritten under a scaler must equal one written under it, in llama.cpp: largest\n"
        f"  difference {same:g}."
    )


def _explained(found: dict[str, Any]) -> str:
    """What vLLM does with configs, and whether `ropewalk explain` says the same."""
    readings, lengths = found["readings"], found["lengths"]
    differ = [f"`{row['config']}`" for row in readings if not row["as_transformers"]]
    as_said = sum(bool(row["as_described"]) for row in readings)
    same = sum(row["vllm"] == row["described"] for row in lengths)
    other = sum(row["vllm"] != row["promised"] for row in lengths)
    text = (
        f"`ropewalk explain` predicts vLLM's frequencies for {as_said} of {len(readings)} configs; vLLM differs from "
        f"transformers in {len(differ)}: {', '.join(differ)}. It predicts the length that vLLM serves for {same} of "
        f"{len(lengths)} configs, of which {other} differ from `max_position_embeddings`."
    )
    return textwrap.fill(text, 100, break_on_hyphens=False)


def _escaped(spec: str) -> str:
    return spec.replace("|", "\\|")
