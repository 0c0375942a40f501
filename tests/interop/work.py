"""The work folder that the scripts of this folder share: the cases, and what every engine found in each.

Imported in every engine's own environment, so it needs nothing but numpy.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

GREEDY = 32
"""Tokens that are written after every text."""

BUILT_IN = "built-in"
QUANTIZED = ("Q4_0", "Q4_K_M", "Q8_0")
"""Formats to which llama.cpp quantizes the larger model."""

QUANTIZED_MODEL, QUANTIZED_TOKENS = "smollm2", 512
"""The model that is read in several formats, and the tokens of the text."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model under a scaler, as it was exported.

    Args:
        model, scaler: short names.
        target: of the export; "hf" or "vllm" or "llama.cpp".
        path: what was exported.
        lengths: tokens of the texts that are read.
        reference: the name of the case whose numbers by ropewalk these shall be.
        group: which engine reads it; "counter" are those that must come out different.
    """

    model: str
    scaler: str
    target: str
    path: str
    lengths: tuple[int, ...]
    reference: str
    group: str

    @property
    def name(self) -> str:
        """As a file name."""
        return f"{self.group}-{self.reference}".replace(" ", "-")


def write_cases(work: Path, cases: list[Case]) -> None:
    """Keep the list of cases."""
    (work / "cases.json").write_text(json.dumps([asdict(case) for case in cases], indent=1), encoding="utf-8")


def read_cases(work: Path, *groups: str) -> list[Case]:
    """The cases of some groups; of all for none."""
    found = [Case(**one) for one in json.loads((work / "cases.json").read_text(encoding="utf-8"))]
    return [case for case in found if not groups or case.group in groups]


def read_ids(work: Path, model: str, length: int) -> list[int]:
    """The beginning of the text, in tokens of `model`."""
    found: list[int] = json.loads((work / "ids.json").read_text(encoding="utf-8"))[model][:length]
    return found


def missing(work: Path, engine: str, cases: list[Case], longest: int) -> Iterator[tuple[Case, list[int]]]:
    """The cases with lengths, shortest first, that this engine has not done yet, none above `longest`."""
    for case in cases:
        lengths = [n for n in sorted(case.lengths) if n <= longest and not _file(work, engine, case.name, n).exists()]
        if lengths:
            yield case, lengths


def save(work: Path, engine: str, name: str, length: int, logprobs: Any, written: list[int], seconds: float) -> None:
    """Keep what an engine found: log-probabilities of all tokens but the first, and what it wrote greedily."""
    file = _file(work, engine, name, length)
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez(file, logprobs=np.asarray(logprobs, np.float64), written=np.asarray(written, np.int64))
    print(f"{engine}: {name} at {length}: mean loss {-np.mean(logprobs):.6f}, {seconds:.0f} s", flush=True)


def load(work: Path, engine: str, name: str, length: int) -> dict[str, Any] | None:
    """What was kept, or None."""
    file = _file(work, engine, name, length)
    return dict(np.load(file)) if file.exists() else None


def quantized_file(work: Path, name: str) -> Path:
    """The GGUF file in a format, or the built-in one."""
    return work / "quantized" / f"{name}.gguf"


def quantized_logits(work: Path, name: str) -> Path:
    """Where llama.cpp's logits of such a file are kept, float32 [tokens, vocabulary]."""
    return work / "quantized" / f"{name}.npy"


def save_versions(work: Path, engine: str, *packages: str) -> None:
    """Keep the versions of the packages that an engine consists of, and when it ran."""
    found = {name: importlib.metadata.version(name) for name in packages}
    found["date"] = time.strftime("%Y-%m-%d")
    (work / f"{engine}.json").write_text(json.dumps(found), encoding="utf-8")


def arguments(*positional: str) -> argparse.Namespace:
    """Of the command line: work, longest and others."""
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument("work", type=Path)
    for name in positional:
        parser.add_argument(name)
    parser.add_argument("--longest", type=int, default=10**9, help="leave longer texts out")
    return parser.parse_args()


def run(work: Path, engine: str, cases: list[Case], longest: int, open_model: Callable[[Case], Any]) -> None:
    """Do all that is missing with one model in memory at a time.

    Args:
        open_model: gives a function from token ids to their log-probabilities and the tokens written after them.
    """
    for case, lengths in missing(work, engine, cases, longest):
        read = open_model(case)
        for length in lengths:
            start = time.monotonic()
            logprobs, written = read(read_ids(work, case.model, length))
            save(work, engine, case.name, length, logprobs, written, time.monotonic() - start)
        del read


def _file(work: Path, engine: str, name: str, length: int) -> Path:
    return work / "found" / engine / f"{name}@{length}.npz"
