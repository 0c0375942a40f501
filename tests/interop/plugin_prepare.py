"""What `rw.patch` on transformers computes for the texts of the plug-in: python plugin_prepare.py WORK."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from cases import MODELS, model_path
from plugin_cases import FAMILIES, FIXED, GREEDY, LENGTH, SHORT, TINY, Case, cases, texts
from transformers import AutoModelForCausalLM
from work import arguments

import ropewalk as rw
from ropewalk.evals.data import load_text, tokenize_documents

sys.path.append(str(Path(__file__).resolve().parents[1] / "engine"))

_CHUNK = 2048  # tokens, whose logits fit into memory


def source_of(model: str, work: Path) -> str:
    """The folder of a model, which is written first if there is none."""
    if model == TINY:
        return model_path(MODELS[TINY])
    folder = work / "models" / model
    if not folder.exists() and model in FAMILIES:
        from families import build

        build(model, FAMILIES[model]).save_pretrained(folder)
    elif not folder.exists():
        rw.export(model, folder, rope="none")
    return str(folder)


@torch.inference_mode()
def read(model: Any, ids: list[int], *, written: bool = True) -> dict[str, Any]:
    """Log-probabilities of all tokens but the first, and the tokens written after them."""
    tokens, cache, found = torch.tensor([ids]), None, []
    for start in range(0, len(ids), _CHUNK):
        out = model(tokens[:, start : start + _CHUNK], past_key_values=cache, use_cache=True)
        targets = tokens[0, start + 1 : start + 1 + _CHUNK]
        logprobs = out.logits[0].log_softmax(-1)
        found += logprobs[: len(targets)].gather(1, targets[:, None])[:, 0].tolist()
        cache, last = out.past_key_values, out.logits[:, -1:].argmax(-1)
    row: dict[str, Any] = {"logprobs": found}
    if written:
        row["written"] = []
        for _ in range(GREEDY):
            row["written"].append(int(last))
            last = model(last, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
    return row


def expected(case: Case, source: str, ids: list[int]) -> dict[str, Any]:
    """What the patched model reads and writes, and how far the scaler moves the log-probabilities of the first text."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    requests = texts(case, ids)
    plain = read(model, requests[case.texts[0]][0], written=False)["logprobs"]
    rw.patch(model, case.scaler, length=LENGTH if case.scaler in FIXED else None)
    found = {name: [read(model, one) for one in requests[name]] for name in case.texts}
    scaled = found[case.texts[0]][0]["logprobs"]
    return {**found, "effect": max(abs(x - y) for x, y in zip(plain, scaled, strict=True))}


def main() -> None:
    """Export a folder for each case, and keep the log-probabilities and the greedy texts."""
    work = arguments().work / "plugin"
    work.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[int]] = {}
    for case in cases():
        if case.model not in FAMILIES and case.model not in found:
            tokenizer = rw.load(source_of(case.model, work), dtype="float32").tokenizer
            found[case.model] = tokenize_documents(load_text("kjv"), tokenizer, limit_tokens=case.length * 4)[0]
    (work / "ids.json").write_text(json.dumps(found), encoding="utf-8")
    for case in cases():
        folder, source = work / case.name, source_of(case.model, work)
        if not folder.exists():
            length = None if case.scaler in SHORT else case.length
            rw.export(source, folder, rope=case.named, target="vllm", length=length)
        if not (folder / "expected.json").exists():
            rows = expected(case, source, found.get(case.model, found[TINY]))
            (folder / "expected.json").write_text(json.dumps(rows), encoding="utf-8")
            print(f"rw.patch: {case.model}, {case.scaler}, effect {rows['effect']:.2g}", flush=True)


if __name__ == "__main__":
    main()
