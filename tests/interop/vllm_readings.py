"""What vLLM's rotary modules compute from configs of every kind: python vllm_readings.py WORK, without ropewalk."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from configs import HEAD_DIM, MAX_LENGTH
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers import rotary_embedding


def reading(parameters: dict[str, Any]) -> dict[str, Any]:
    """Frequencies and m, from the module's own table: its row for position 1 is m cos w, m sin w."""
    rotary_embedding._ROPE_DICT.clear()  # to which 4 and 4.0 are the same
    try:
        module = rotary_embedding.get_rope(
            HEAD_DIM, max_position=MAX_LENGTH, rope_parameters=parameters, dtype=torch.float32
        )
    except Exception as error:  # whatever it raises is how it refuses
        return {"refused": f"{type(error).__name__}: {error}"}
    row = 1
    if hasattr(module, "long_short_cos_sin_cache"):
        table = module.long_short_cos_sin_cache
        row += module.original_max_position_embeddings if module.use_long_rope else 0
    else:
        table = module.cos_sin_cache
    cos, sin = table[row].double().chunk(2)
    return {
        "inv_freq": torch.atan2(sin, cos).tolist(),
        "m": torch.hypot(sin, cos).mean().item(),
        "rows": len(table),
    }


def main() -> None:
    """All configs."""
    work = Path(sys.argv[1])
    config = VllmConfig()
    object.__setattr__(config, "model_config", SimpleNamespace(max_model_len=MAX_LENGTH))  # all that LongRoPE asks for
    configs = json.loads((work / "configs.json").read_text(encoding="utf-8"))
    with set_current_vllm_config(config):
        found = {name: reading(parameters) for name, parameters in configs.items()}
    (work / "vllm-readings.json").write_text(json.dumps(found), encoding="utf-8")
    for name, one in found.items():
        print(f"{name}: {one.get('refused') or one['m']}")


if __name__ == "__main__":
    main()
