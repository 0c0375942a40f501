"""Writes what was found with the plug-in for vLLM to docs/results (vllm_plugin.json, vllm_speed.json):
python plugin_report.py WORK."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from plugin_cases import FAMILIES
from report import LIMIT, OUT

from ropewalk.scaling.spec import parse

PLUGIN, SPEED = OUT.with_name("vllm_plugin.json"), OUT.with_name("vllm_speed.json")

LARGEST = 1e-4
"""Of a log-probability between vLLM with the plug-in and a patched model under a position map."""

FLOAT32_TOKENS = 1000
"""Without a map, transformers computes the angles in float32, and the plug-in in float64. The longest text has fewer
tokens."""


def failures(rows: list[dict[str, Any]]) -> Iterator[str]:
    """What vLLM with the plug-in computed otherwise than it must."""
    for row in rows:
        what = f"plug-in, {row['model']}, {row['scaler']}, {row['check']}"
        largest = LARGEST if parse(row["scaler"], 1024).member("positions") else LIMIT * FLOAT32_TOKENS
        if row["max"] is not None and row["max"] > largest:
            yield f"{what}: a log-probability differs by {row['max']:.2g}"
        if row["max"] is not None and row["effect"] < 100 * largest:
            yield f"{what}: the scaler changes log-probabilities by {row['effect']:.2g} only, so this shows nothing"
        if row["same_text"] < row["requests"]:
            yield f"{what}: {row['same_text']} of {row['requests']} texts are the same"
        windows = FAMILIES.get(row["model"], {}).get("sliding_window")  # vLLM gave a shared beginning to none of these
        if row["check"] in ("same prompt again", *(() if windows else ("shared prefix",))) and not row["cached"]:
            yield f"{what}: no token came from the prefix cache"
        if row.get("preempted") == 0:
            yield f"{what}: no request was preempted"


def main() -> None:
    """Everything that was found; fails if something is not as it was promised."""
    work = Path(sys.argv[1]) / "plugin"
    SPEED.write_text((work / "speed.json").read_text(encoding="utf-8") + "\n", encoding="utf-8")
    found = json.loads((work / "found.json").read_text(encoding="utf-8"))
    PLUGIN.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if wrong := list(failures(found)):
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
