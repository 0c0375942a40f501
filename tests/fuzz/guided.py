"""Coverage-guided fuzzing, by atheris: python tests/fuzz/guided.py [--seconds 300] [PARSER...].

Inputs of tests/fuzz/parsers.py are the seeds; atheris changes them, and goes on from those that reach code of ropewalk
or gguf that none reached before. As in tests/fuzz/run.py, each parser runs in a process of its own, and what is
neither read nor refused by a RopewalkError, takes longer than 10 s (of CPU time) or more than 4 GiB is a failure, and
is kept in runs/fuzz/guided. Any parser that takes bytes or text can be named. Without names it runs those whose
reading is Python's, as the code of other languages is not measured, and writes docs/results/fuzz_guided.json.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from judge import KEPT, MOST_MEMORY, MOST_SECONDS, ROOT, judge, keep

USUAL = ("length", "spec", "GGUF header", "safetensors", "results.jsonl")
SEEDS, LARGEST = 300, 40_000  # larger inputs than that (JSON nested 100,000 deep) are run.py's


def seeds(parser: Any) -> list[Any]:
    """Inputs of the parser's own strategy, the same in every run."""
    from hypothesis import HealthCheck, Phase, given, settings

    found: list[Any] = []

    @settings(
        max_examples=SEEDS,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(parser.inputs())
    def one(value: Any) -> None:
        found.append(value)

    one()
    return found


def work(name: str, seconds: int, counts: Path) -> None:
    """Fuzz one parser in this process, which libFuzzer ends; the counts go into a file."""
    import atheris

    # numba compiles the kernels from their own bytecode.
    with atheris.instrument_imports(include=["ropewalk", "gguf"], exclude=["ropewalk.engine.runners.cpu.kernels"]):
        from parsers import PARSERS

        parser, found, kept = PARSERS[name], Counter[str](), KEPT / "guided" / name.replace(" ", "-")
        samples = seeds(parser)
        if not isinstance(samples[0], str | bytes):
            raise SystemExit(f"{name} takes neither bytes nor text")
        is_text = isinstance(samples[0], str)
        corpus = Path(tempfile.mkdtemp(prefix="ropewalk-guided-"))
        raw = [sample.encode("utf-8", "surrogatepass") if is_text else sample for sample in samples]
        raw = [data for data in raw if len(data) <= LARGEST]
        for number, data in enumerate(raw):
            (corpus / str(number)).write_bytes(data)
        with contextlib.suppress(Exception):
            parser.read(samples[0])  # loading a model is no input

        written = counts.open("wb", buffering=0)

        def one(data: bytes) -> None:
            judge(parser.read, kept, data.decode("utf-8", "surrogateescape") if is_text else data, found)
            written.seek(0)
            written.write(json.dumps(found).encode())  # each time: the process ends without a word

        limits = [f"-max_total_time={seconds}", f"-timeout={6 * MOST_SECONDS}", f"-max_len={max(map(len, raw))}"]
        limits.append(f"-rss_limit_mb={(MOST_MEMORY >> 20) + 1024}")  # torch and a model take less than the 1 GiB
        atheris.Setup(
            [sys.argv[0], *limits, "-print_final_stats=1", f"-artifact_prefix={counts.parent}/", str(corpus)], one
        )
        atheris.Fuzz()


def guided(name: str, seconds: int) -> dict[str, Any]:
    """Fuzz one parser in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        counts = Path(folder) / "counts.json"
        command = [sys.executable, __file__, "--work", str(counts), "--seconds", str(seconds), name]
        began = time.perf_counter()
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace")
        took = time.perf_counter() - began
        found = json.loads(counts.read_text()) if counts.exists() else {}
        for file in Path(folder).glob("*-*"):  # libFuzzer's own: an input that the process died of, or hung at
            keep(KEPT / "guided" / name.replace(" ", "-") / file.name, file.read_bytes(), "the process died")
    for line in done.stderr.splitlines():
        if line.startswith("FAILED"):
            print(f"{name}: {line}")
    executed = re.search(r"stat::number_of_executed_units:\s*(\d+)", done.stderr)
    reached = re.findall(r"cov: (\d+) ft: (\d+)", done.stderr)
    row = {"parser": name, "executions": int(executed[1]) if executed else 0}
    row |= {kind: found.get(kind, 0) for kind in ("read", "refused", "failed")}
    row |= {"edges": int(reached[-1][0]), "features": int(reached[-1][1])} if reached else {}
    if done.returncode:
        print(done.stderr[-3000:], file=sys.stderr)
        row["died"] = done.returncode
    return row | {"seconds": round(took)}


def main() -> None:
    """Fuzz the parsers that are named, one after the other."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("parsers", nargs="*", metavar="PARSER", help=f"by default {', '.join(USUAL)}")
    options.add_argument("--seconds", type=int, default=300, help="for each parser")
    options.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if importlib.util.find_spec("atheris") is None:
        sys.exit(
            "guided.py needs atheris, which is no dependency of ropewalk: pip install atheris (Linux or macOS), best "
            "into a virtual environment of its own, with ropewalk installed as for its tests"
        )
    for folder in ("tests/fuzz", "tests/tokenizer_tools"):
        sys.path.insert(0, str(ROOT / folder))
    warnings.simplefilter("ignore")
    os.environ["TQDM_DISABLE"] = "1"
    if chosen.work:
        work(chosen.parsers[0], chosen.seconds, chosen.work)
    rows = []
    for name in chosen.parsers or USUAL:
        rows.append(guided(name, chosen.seconds))
        print(json.dumps(rows[-1]), flush=True)
    if not chosen.parsers:
        (ROOT / "docs" / "results" / "fuzz_guided.json").write_text(json.dumps(rows, indent=1) + "\n")
    sys.exit(any(row["failed"] or "died" in row for row in rows))


if __name__ == "__main__":
    main()
