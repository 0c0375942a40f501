"""What `rw.patch` on transformers computes for the texts of the plug-in: python plugin_prepare.py WORK."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from cases import MODELS, model_path
from plugin_cases import FIXED, GREEDY, LENGTH, LISTED, MIXED, SHORT, SPECS, texts
from transformers import AutoModelForCausalLM
from work import arguments

import ropewalk as rw
from ropewalk.evals.data import load_text, tokenize_documents


def read(model: Any, ids: list[int]) -> dict[str, Any]:
    """Log-probabilities of all tokens but the first, and the tokens written after them."""
    tokens = torch.tensor([ids])
    with torch.inference_mode():
        logprobs = model(tokens).logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
        written = model.generate(tokens, max_new_tokens=GREEDY, do_sample=False, eos_token_id=-1)[0, len(ids) :]
    return {"logprobs": logprobs.tolist(), "written": written.tolist()}


def main() -> None:
    """Export a folder for each scaler, and keep the log-probabilities and the greedy texts."""
    work = arguments().work / "plugin"
    work.mkdir(parents=True, exist_ok=True)
    source = model_path(MODELS["tiny"])
    tokenizer = rw.load(source, dtype="float32").tokenizer
    ids = tokenize_documents(load_text("kjv"), tokenizer, limit_tokens=4 * LENGTH)[0]
    (work / "ids.json").write_text(json.dumps(ids), encoding="utf-8")
    for number, spec in enumerate(SPECS):
        folder = Path(work / f"{number}")
        if (folder / "expected.json").exists():
            continue
        if not folder.exists():
            rw.export(source, folder, rope=spec, target="vllm", length=None if spec in SHORT else LENGTH)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        rw.patch(model, spec, length=LENGTH if spec in FIXED else None)
        found = {name: [read(model, one) for one in texts(ids)[name]] for name in LISTED}
        if spec == MIXED:
            found["mixed"] = [read(model, one) for one in texts(ids)["mixed"]]
        (folder / "expected.json").write_text(json.dumps(found), encoding="utf-8")
        print(f"rw.patch: {spec}", flush=True)


if __name__ == "__main__":
    main()
