"""Tokens that vLLM serves of the models in tests/data/served.json: python vllm_lengths.py WORK, without ropewalk."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from vllm.config import ModelConfig

MODELS = Path(__file__).resolve().parents[1] / "data" / "served.json"


def served(config: dict[str, Any]) -> int | str:
    """`max_model_len` of vLLM's own ModelConfig, or how it refuses the config."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        try:
            return int(ModelConfig(model=folder, tokenizer=folder, skip_tokenizer_init=True).max_model_len)
        except Exception as error:  # whatever it raises is how it refuses
            return f"{type(error).__name__}: {error}"


def main() -> None:
    """All models."""
    found = {}
    for name, one in json.loads(MODELS.read_text(encoding="utf-8")).items():
        found[name] = served(one["config"])
        print(f"{name}: {found[name]}", flush=True)
    (Path(sys.argv[1]) / "vllm-lengths.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
