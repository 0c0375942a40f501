"""Throws inputs at everything that reads some: python tests/fuzz/run.py [--inputs 100000] [--only NAME].

Each parser runs in a process of its own, so that one that dies is seen too. What is neither read nor refused by a
RopewalkError, takes longer than 10 s or more than 4 GiB is a failure, and is kept in runs/fuzz. Writes
docs/results/fuzz.json when every parser has run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from judge import KEPT, MOST_MEMORY, MOST_SECONDS, ROOT, judge


def too_long(*_: Any) -> None:
    raise TimeoutError(f"longer than {MOST_SECONDS} s")


def work(name: str, count: int, seed: int) -> dict[str, Any]:
    """Fuzz one parser in this process."""
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded
    from parsers import PARSERS

    parser, kept = PARSERS[name], KEPT / name.replace(" ", "-")
    kept.mkdir(parents=True, exist_ok=True)
    found: Counter[str] = Counter()
    slowest = [0.0]
    current = (kept / "current").open("wb", buffering=0)
    signal.signal(signal.SIGALRM, too_long)

    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(parser.inputs())
    def one(value: Any) -> None:
        if found.total() >= count:
            return
        current.seek(0)
        current.write(pickle.dumps(value))  # what a process that dies here died of
        current.truncate()
        began = time.perf_counter()
        signal.alarm(MOST_SECONDS)
        try:
            judge(parser.read, kept, value, found)
        finally:
            signal.alarm(0)
        if (seconds := time.perf_counter() - began) > slowest[0]:
            slowest[0] = seconds
            (kept / "slowest").write_bytes(pickle.dumps(value))

    # Loading torch and a model is no input: memory is counted from here on, and bounded.
    parser.inputs()
    with contextlib.suppress(Exception):
        parser.read(parser.inputs().example())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MOST_MEMORY,) * 2)
    began, rounds = time.perf_counter(), 0
    while found.total() < count and rounds < 50:  # hypothesis ends early where it believes to have seen everything
        seeded(seed + rounds)(one)()
        rounds += 1
    (kept / "current").unlink()
    return {
        "parser": name,
        "inputs": found.total(),
        **{kind: found[kind] for kind in ("read", "refused", "failed")},
        "slowest_s": round(slowest[0], 3),
        "seconds": round(time.perf_counter() - began, 1),
        "grown_mb": max(0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def main() -> None:
    """Fuzz all parsers, one after the other."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--inputs", type=int, default=100_000, help="in all")
    options.add_argument("--only", action="append", help="a parser; may be repeated")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--work", help=argparse.SUPPRESS)
    chosen = options.parse_args()
    for folder in ("tests/fuzz", "tests/tokenizer_tools"):
        sys.path.insert(0, str(ROOT / folder))
    warnings.simplefilter("ignore")
    if chosen.work:
        print(json.dumps(work(chosen.work, chosen.inputs, chosen.seed)))
        return
    from parsers import PARSERS

    rows, shares = [], sum(parser.share for parser in PARSERS.values())
    for name, parser in PARSERS.items():
        if chosen.only and name not in chosen.only:
            continue
        count = -(-chosen.inputs * parser.share // shares)
        command = [sys.executable, __file__, "--work", name, "--inputs", str(count), "--seed", str(chosen.seed)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"TQDM_DISABLE": "1"})
        last = done.stdout.strip().splitlines()[-1:] or [""]
        if done.returncode or not last[0].startswith("{"):
            rows.append({"parser": name, "died": done.returncode})
        else:
            rows.append(json.loads(last[0]))
        print(json.dumps(rows[-1]), flush=True)
    if not chosen.only:
        (ROOT / "docs" / "results" / "fuzz.json").write_text(json.dumps(rows, indent=1) + "\n")
    sys.exit(any(row.get("failed") or "died" in row for row in rows))


if __name__ == "__main__":
    main()
