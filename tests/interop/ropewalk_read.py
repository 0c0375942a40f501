"""Keeps what ropewalk computes for every case from the model as it was, not from the export:
python ropewalk_read.py WORK."""

from __future__ import annotations

import time
from pathlib import Path

from cases import FROZEN, MODELS, model_path, scaler
from work import GREEDY, arguments, load, read_cases, read_ids, save, save_versions

import ropewalk as rw
from ropewalk.scaling.longrope import fix_length
from ropewalk.scaling.spec import parse


def wanted(work: Path, label: str) -> dict[tuple[str, str], set[int]]:
    """The lengths at which each (name for files, scaler) is asked for by any engine."""
    found: dict[tuple[str, str], set[int]] = {}
    for case in read_cases(work):
        if case.model == label:
            found.setdefault((case.reference, case.scaler), set()).update(case.lengths)
    return found


def main() -> None:
    """Everything that is missing."""
    given = arguments()
    work = given.work
    params = rw.SamplingParams(max_new_tokens=GREEDY, temperature=0)
    for label, model in MODELS.items():
        loaded = rw.load(model_path(model), dtype="float32", max_length=model.beyond + GREEDY)
        for (reference, name), lengths in wanted(work, label).items():
            own = scaler(name, model.dim)
            loaded.rope = fix_length(parse(own), loaded.spec, 4 * loaded.trained_length) if name in FROZEN else own
            for length in sorted(n for n in lengths if n <= given.longest):
                if load(work, "ropewalk", reference, length) is None:
                    ids, start = read_ids(work, label, length), time.monotonic()
                    cache = loaded.new_cache(length + GREEDY)
                    logprobs = loaded.score_ids(ids, cache=cache).tolist()
                    written = loaded.generate_ids(ids, params, cache=cache).token_ids
                    save(work, "ropewalk", reference, length, logprobs, written, time.monotonic() - start)
    save_versions(work, "ropewalk", "ropewalk", "torch", "transformers", "gguf")


if __name__ == "__main__":
    main()
