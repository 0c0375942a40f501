"""Models written for other software.

`export.py` has the public function. `hf_folder.py` writes folders for transformers, `vllm_sglang.py` has what vLLM and
SGLang need beside that, `llama_cpp_ollama.py` places the GGUF files that `gguf_write.py` writes.
"""

from __future__ import annotations

from typing import Literal, get_args

Target = Literal["hf", "vllm", "sglang", "llama.cpp", "ollama"]
TARGETS: tuple[Target, ...] = get_args(Target)
"""The software that `export` writes for."""
