"""Serves the folders of `plugin_prepare.py` with vLLM and ropewalk's plug-in, and compares them with `rw.patch`:
python plugin_vllm.py WORK. It writes what it found to WORK/plugin/found.json."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING"}

from plugin_cases import GREEDY, LENGTH, MIXED, SPECS, texts


def open_model(folder: Path, **options: Any) -> Any:
    """The folder as vLLM serves it."""
    from vllm import LLM

    return LLM(
        str(folder),
        dtype="float32",
        enforce_eager=True,
        max_num_batched_tokens=256,
        max_model_len=LENGTH,
        hf_overrides={"max_position_embeddings": LENGTH},
        **options,
    )


def served(llm: Any, requests: list[list[int]], *, scored: bool) -> list[dict[str, Any]]:
    """Log-probabilities and written tokens of requests that run together."""
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0, max_tokens=GREEDY, ignore_eos=True, prompt_logprobs=0 if scored else None, logprobs=0
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


Found = dict[str, dict[str, Any]]


def checks(folder: Path, requests: dict[str, list[list[int]]], expected: dict[str, Any]) -> Found:
    """Requests that run together, and beginnings of prompts that come from the prefix cache."""
    llm, (whole, other) = open_model(folder), requests["shared"]
    found = {"together": compared(served(llm, requests["together"], scored=True), expected["together"])}
    twice = [served(llm, [whole], scored=False)[0] for _ in range(2)]
    found["same prompt again"] = compared(twice, expected["shared"][:1] * 2)
    found["shared prefix"] = compared(served(llm, [other], scored=False), expected["shared"][1:])
    if "mixed" in expected:
        found["mixed lengths"] = compared(served(llm, requests["mixed"], scored=True), expected["mixed"])
    return found


def on_two(folder: Path, requests: dict[str, list[list[int]]], expected: dict[str, Any]) -> Found:
    """Tensor parallel on two processes."""
    llm = open_model(folder, tensor_parallel_size=2)
    return {"two processes": compared(served(llm, requests["together"], scored=True), expected["together"])}


def preempted(folder: Path, requests: dict[str, list[list[int]]], expected: dict[str, Any]) -> Found:
    """The requests with so few pages that some are preempted and resumed."""
    llm = open_model(folder, num_gpu_blocks_override=24, block_size=64, enable_prefix_caching=False)
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    own, count = scheduler._preempt_request, [0]

    def counted(*args: Any, **options: Any) -> Any:
        count[0] += 1
        return own(*args, **options)

    scheduler._preempt_request = counted
    row = compared(served(llm, requests["mixed"], scored=False), expected["mixed"])
    return {"preempted": row | {"preempted": count[0]}}


def main() -> None:
    """Everything that is missing, a process for each check: vLLM's worker does not start after numba is loaded."""
    work = Path(sys.argv[1]) / "plugin"
    file = work / "found.json"
    rows = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    if len(sys.argv) == 2:
        for number, spec in enumerate(SPECS):
            for check in ("served", *(("preempted", "two processes") if spec == MIXED else ())):
                if not any(row["scaler"] == spec and row["group"] == check for row in rows):
                    subprocess.run([sys.executable, __file__, sys.argv[1], f"{number}", check], check=True)
        return
    number, group = sys.argv[2:]
    all_texts = texts(json.loads((work / "ids.json").read_text(encoding="utf-8")))
    folder = work / number
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    found = {"served": checks, "preempted": preempted, "two processes": on_two}[group](folder, all_texts, expected)
    rows += [{"scaler": SPECS[int(number)], "group": group, "check": check, **row} for check, row in found.items()]
    file.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    print(*rows[-len(found) :], sep="\n", flush=True)


if __name__ == "__main__":
    main()
