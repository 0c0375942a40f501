"""Reads every exported folder with transformers alone: python stock.py WORK ENGINE, without ropewalk installed."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM
from work import GREEDY, Case, arguments, read_cases, run, save_versions

CHUNK = 512


def open_model(case: Case) -> Any:
    """The model as anyone loads it."""
    model = AutoModelForCausalLM.from_pretrained(case.path, dtype=torch.float32).eval()

    def read(ids: list[int]) -> tuple[list[float], list[int]]:
        out = model.model(input_ids=torch.tensor([ids]), use_cache=True)
        hidden, following = out.last_hidden_state[0], torch.tensor(ids[1:])
        logprobs: list[float] = []
        for start in range(0, len(ids) - 1, CHUNK):  # all logits of a long text at once would be gigabytes
            some = following[start : start + CHUNK]
            logits = model.lm_head(hidden[start : start + len(some)]).double().log_softmax(-1)
            logprobs += logits.gather(1, some[:, None])[:, 0].tolist()
        written = [int(model.lm_head(hidden[-1]).argmax())]
        while len(written) < GREEDY:
            step = model(input_ids=torch.tensor([written[-1:]]), past_key_values=out.past_key_values, use_cache=True)
            written.append(int(step.logits[0, -1].argmax()))
        return logprobs, written

    return read


def main() -> None:
    """Everything that is missing."""
    given = arguments("engine")
    with torch.inference_mode():
        run(given.work, given.engine, read_cases(given.work, "hf"), given.longest, open_model)
    save_versions(given.work, given.engine, "transformers", "torch")


if __name__ == "__main__":
    main()
