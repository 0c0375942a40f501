"""One process, mixed work for a long time, also of a server in it: python tests/long_life.py [--minutes 10].

Says every so often how much memory and how many open files the process has, and at the end whether the answers are
those of the beginning. Writes docs/results/long_life.json.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import random
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import psutil
import torch
from transformers import AutoModelForCausalLM

import ropewalk as rw

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "server"))
from running import serving  # noqa: E402

TINY = ROOT / "tests" / "data" / "tiny-llama"
TEXT = (ROOT / "tests" / "long_life.py").read_text()
SPECS = ("none", "yarn:4", "ntk-mixed:4", "rerope:64|logn", "self-extend:8,window=64", "dual-chunk", "dynamic-yarn")
GREEDY = rw.SamplingParams(max_new_tokens=12, temperature=0)


class Life:
    """The work, one kind a method."""

    def __init__(self, model: Any, hf: Any, url: str, folder: Path) -> None:
        self.model, self.hf, self.url, self.folder, self.rng = model, hf, url, folder, random.Random(0)

    def prompt(self, most: int = 1200) -> str:
        at = self.rng.randrange(len(TEXT) - 40)
        return TEXT[at : at + self.rng.randrange(20, most)]

    def scale(self) -> None:
        self.model.rope = self.rng.choice(SPECS)

    def generate(self) -> None:
        self.model.generate(self.prompt(), GREEDY)

    def batch(self) -> None:
        self.model.generate([self.prompt(400) for _ in range(self.rng.randrange(2, 6))], GREEDY)

    def abandon(self) -> None:
        stream = self.model.stream(self.prompt(), GREEDY)
        for _ in range(self.rng.randrange(3)):
            next(stream, None)

    def session(self) -> None:
        with self.model.session() as one:
            one.append(self.prompt())
            fork = one.fork()
            fork.generate("\n", GREEDY)
            one.crop(10)
            self.scale()
            one.generate("x", GREEDY)
            one.save(self.folder / "session")
        self.model.session(self.folder / "session").close()

    def contexts(self) -> None:
        texts = [self.prompt(600) for _ in range(self.rng.randrange(1, 5))]
        self.model.generate("What is it?", GREEDY, contexts=texts)

    def score(self) -> None:
        self.model.score(self.prompt())

    def refused(self) -> None:
        for wrong in ("\ud800", "a b " * 20_000):
            try:
                self.model.generate(wrong, GREEDY)
            except rw.RopewalkError:
                continue
            raise AssertionError("not refused")

    def patch(self) -> None:
        handle = rw.patch(self.hf, self.rng.choice(SPECS[1:]))
        with torch.inference_mode():
            self.hf(torch.tensor([[1, 2, 3]]))
        handle.undo()

    def ask(self) -> None:
        body = self._body() | {"n": self.rng.randrange(1, 4), "logprobs": self.rng.randrange(4)}
        assert httpx2.post(f"{self.url}/v1/completions", json=body, timeout=600).status_code == 200

    def ask_together(self) -> None:
        bodies = [self._body() for _ in range(self.rng.randrange(2, 12))]
        with ThreadPoolExecutor(len(bodies)) as pool:
            asked = [pool.submit(httpx2.post, f"{self.url}/v1/completions", json=b, timeout=600) for b in bodies]
            assert {one.result().status_code for one in asked} == {200}

    def leave_a_stream(self) -> None:
        body = self._body() | {"stream": True, "max_tokens": 400}
        with httpx2.stream("POST", f"{self.url}/v1/completions", json=body, timeout=600) as answer:
            next(answer.iter_lines())

    def be_refused(self) -> None:
        fields = self.rng.choice(({"rope": "yarn:no"}, {"prompt": "a b " * 40_000}, {"prompt": 7}, {"unknown": 1}))
        assert httpx2.post(f"{self.url}/v1/completions", json=self._body() | fields, timeout=600).status_code == 400

    def _body(self) -> dict[str, Any]:
        return {"prompt": self.prompt(), "max_tokens": 12, "temperature": 0, "rope": self.rng.choice(SPECS)}

    def perplexity(self) -> None:
        text = self.folder / "text.txt"
        rw.evals.perplexity(self.model, text, lengths=[128, 256], ropes=["none", "yarn:2"], target=64, samples=2)


def answers(model: Any) -> list[Any]:
    """What the model says now, under every scaler."""
    found = []
    for spec in SPECS:
        model.rope = spec
        completion = model.generate("import os\n\n\ndef ", GREEDY)
        found.append((completion.token_ids, model.score(TEXT[:1500]).logprobs.tolist()))
    return found


def main() -> None:
    """Work for some minutes."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--minutes", type=float, default=10)
    minutes = options.parse_args().minutes
    torch.set_num_threads(1)
    process, done = psutil.Process(), Counter[str]()
    samples: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        (Path(folder) / "text.txt").write_text(TEXT * 2)
        model = rw.load(TINY, max_length=8192)
        served = rw.load(TINY, max_length=8192, compile=True)
        url, _ = stack.enter_context(serving(served, limits={"cache_bytes": 64 << 20}))
        life = Life(model, AutoModelForCausalLM.from_pretrained(TINY).eval(), url, Path(folder))
        kinds = [name for name in vars(Life) if name[0] != "_" and name != "prompt"]
        first = answers(model)
        for name in kinds:
            getattr(life, name)()  # compiles what is compiled at the first use
        start = time.monotonic()
        while (past := time.monotonic() - start) < 60 * minutes:
            if past >= len(samples) * 3 * minutes:  # twenty times
                gc.collect()
                samples.append(
                    {
                        "minute": round(past / 60, 1),
                        "memory_mb": round(process.memory_info().rss / 1e6),
                        "files": process.num_fds(),
                        "threads": process.num_threads(),
                    }
                )
                print(json.dumps(samples[-1] | {"works": done.total()}), flush=True)
            name = life.rng.choice(kinds)
            getattr(life, name)()
            done[name] += 1
        same = answers(model) == first
    result = {"minutes": minutes, "same_answers": same, "works": dict(done), "samples": samples}
    (ROOT / "docs" / "results" / "long_life.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["works"]), "same answers" if same else "OTHER ANSWERS")
    sys.exit(not same)


if __name__ == "__main__":
    main()
