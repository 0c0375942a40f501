"""How engines are started on what `export` wrote."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

__all__ = ["TARGETS", "Target", "modelfile", "serve_command", "serve_script"]

Target = Literal["hf", "vllm", "sglang", "llama.cpp", "ollama"]
TARGETS: tuple[Target, ...] = get_args(Target)
"""What `export` writes for."""

_SERVERS = {
    "vllm": ("vllm serve {model} --max-model-len {length}", "--hf-overrides"),
    "sglang": (
        "python -m sglang.launch_server --model-path {model} --context-length {length}",
        "--json-model-override-args",
    ),
}


def serve_command(target: str, path: Path, length: int) -> str:
    """The command that serves `path` up to `length` tokens; empty for hf."""
    if target in _SERVERS:
        return _SERVERS[target][0].format(model=shlex.quote(str(path)), length=length)
    if target == "llama.cpp":
        return f"llama-server -m {shlex.quote(str(path))} -c {length}"
    if target == "ollama":
        return f"ollama create {shlex.quote(path.name.lower())} -f {shlex.quote(str(path / 'Modelfile'))}"
    return ""


def serve_script(target: str, scaler: str, length: int, overrides: Mapping[str, Any]) -> str:
    """A shell script that serves the folder it lies in with vLLM or SGLang.

    Args:
        overrides: the changed keys of config.json, with which the engine serves the original checkpoint alike.
    """
    line, option = _SERVERS[target]
    own = line.format(model='"$(dirname "$0")"', length=length)
    original = f"{line.format(model='MODEL', length=length)} {option} {shlex.quote(json.dumps(overrides))}"
    return (
        "#!/bin/sh\n"
        f"# Serves the folder that this file lies in under {scaler}, up to {length} tokens.\n"
        f"# The original checkpoint is served alike by\n#   {original}\n"
        f'exec {own} "$@"\n'
    )


def modelfile(file: str, length: int) -> str:
    """Ollama's Modelfile for a GGUF file beside it."""
    return f"FROM ./{file}\nPARAMETER num_ctx {length}\n"
