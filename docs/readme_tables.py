"""The generated parts of README.md, from the code and the runs in docs/results."""

from __future__ import annotations

import textwrap
from pathlib import Path

import continuation_tables
import position_tables
import speed_tables
from families_page import SERVED, read_families

from ropewalk.evals.contexts.report import WayScore, way_scores
from ropewalk.evals.continuation.methods import EXACT, OFF
from ropewalk.evals.runs.result import Run
from ropewalk.scaling import METHODS, format_length

DOCS = Path(__file__).resolve().parent

WIDTH = 100


def tables() -> dict[str, str]:
    """Every block by its name."""
    return {"choice": position_tables.readme_table(), "features": "\n".join(map(_bullet, _features()))}


def _bullet(text: str) -> str:
    """Wrapped; at most two lines."""
    lines = textwrap.wrap(f"- {text}", WIDTH, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False)
    assert len(lines) <= 2, f"a bullet of {len(lines)} lines: {text}"
    return "\n".join(lines)


def _features() -> list[str]:
    facets = [method.facet for method in METHODS.built_in.values()]
    families = read_families()
    every = sum(verdict == (SERVED, SERVED) for verdict in families.values())
    decode = {engine: _range(speed_tables.ratios(engine, "decode")) for engine in ("hf bfloat16", "llama.cpp bf16")}
    prompts = {engine: _range(speed_tables.ratios(engine, "prefill")) for engine in decode}
    bits = {
        method: continuation_tables.values()["code, any character", method]["next_byte_bits"].mean
        for method in (EXACT, OFF)
    }
    ways = way_scores(Run(DOCS / "results" / "facts").rows)
    whole = [way for way in ways if way.way == "whole"]
    pooled = max((way for way in ways if way.parts > 1), key=lambda way: way.right)
    return [
        f"**{facets.count('frequencies')} frequency methods, {facets.count('positions')} position maps, "
        f"{facets.count('temperature')} temperatures, a wavelength grid**, in any composition: "
        '`"ntk:4|resonance|logn"`. [Each](docs/scalers.md) has its formula and paper.',
        f"**Your own transformers model**: `rw.patch` works on it and undoes itself. Of {len(families)} "
        f"[architectures](docs/families.md) {every} take every method.",
        "**[Measurements](docs/evaluation.md)** with paired intervals: perplexity, harm, passkeys, RULER-11. "
        "[`ropewalk tune`](docs/tune.md) finds the scaler that carries your model to a length.",
        "**[Chat and server](docs/server.md)**: `ropewalk serve` speaks OpenAI's protocol, and "
        "every request may name its scaler.",
        f"**[Decoding on a CPU](docs/engine.md)** in bfloat16: {decode['hf bfloat16']} times transformers' speed "
        f"(prompts: {prompts['hf bfloat16']}), {decode['llama.cpp bf16']} times llama.cpp's "
        f"({prompts['llama.cpp bf16']}).",
        "**[A prompt may end inside a word](docs/continuation.md)**: its last tokens are drawn again, exactly, with "
        f"what follows; the next byte of code then takes {bits[EXACT]:.1f} bits, not {bits[OFF]:.1f}.",
        f"**[Many texts](docs/contexts.md)**: read in parts, SmolLM2 found {pooled.right:.0%} of {pooled.trials} facts "
        f"in {format_length(pooled.context)} tokens; read whole, {_shares(whole)} under any scaler tried.",
        "**[Export](docs/export.md)** of frequency methods to transformers, vLLM, SGLang, llama.cpp and Ollama. "
        "With ropewalk beside it, vLLM on a CPU serves position maps too.",
    ]


def _range(values: list[float]) -> str:
    low, high = f"{min(values):.2g}", f"{max(values):.2g}"
    return f"{low} to {high}"


def _shares(ways: list[WayScore]) -> str:
    low, high = min(way.right for way in ways), max(way.right for way in ways)
    return f"{100 * low:.0f} to {high:.0%}"
