"""The export to vLLM and SGLang: the rotary config that both read, and how to start them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...scaling import hf, hf_write
from ...scaling.longrope import LongRoPE
from ...scaling.rope import Scaler

__all__ = ["rope_parameters", "serve_command", "serve_script"]

_SERVERS = {
    "vllm": ("vllm serve {model} --max-model-len {length}", "--hf-overrides"),
    "sglang": (
        "python -m sglang.launch_server --model-path {model} --context-length {length}",
        "--json-model-override-args",
    ),
}
"""The command that starts an engine, and its option that replaces keys of config.json."""


def rope_parameters(
    rope: hf.ConfiguredRope, scaler: Scaler, *, latent_attention: bool = False, as_longrope: bool = False
) -> dict[str, Any]:
    """The `rope_parameters` from which both engines compute the frequencies of `scaler`.

    Args:
        rope: the model's rotary embedding.
        scaler: a static scaler.
        latent_attention: the model derives its softmax scale from `rope_parameters`, as DeepSeek-V3 does.
        as_longrope: write LongRoPE factors, also where a simpler form exists.

    Raises:
        ConfigError: the engines cannot compute the scaler.
    """
    # A model with latent attention that ships with longrope is read as longrope; the others are read as yarn.
    yarn_only = latent_attention and not isinstance(rope.scaler, LongRoPE)
    return hf_write.write_served(
        rope.rope, scaler, head_dim=rope.head_dim, yarn_only=yarn_only, as_longrope=as_longrope
    )


def serve_command(target: str, folder: Path, length: int) -> str:
    """The command that serves `folder` up to `length` tokens."""
    return _SERVERS[target][0].format(model=shlex.quote(str(folder)), length=length)


def serve_script(target: str, scaler: str, length: int, overrides: Mapping[str, Any], *, plugin: bool = False) -> str:
    """A shell script that serves the folder in which it lies.

    Args:
        overrides: the changed keys of config.json. A comment gives the command that serves the original checkpoint
            with these keys.
        plugin: the scaler is one that ropewalk's plug-in computes.
    """
    command, option = _SERVERS[target]
    exported = command.format(model='"$(dirname "$0")"', length=length)
    original = f"{command.format(model='MODEL', length=length)} {option} {shlex.quote(json.dumps(overrides))}"
    return (
        "#!/bin/sh\n"
        f"# Serves the folder of this file under {scaler}, up to {length} tokens.\n"
        + ("# It needs ropewalk in the Python environment of vLLM, which refuses the folder without it.\n" * plugin)
        + f"# This command serves the original checkpoint in the same way:\n#   {original}\n"
        f'exec {exported} "$@"\n'
    )
