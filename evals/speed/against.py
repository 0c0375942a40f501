"""The comparison of ropewalk with other engines, from the option `--against` to the result."""

from __future__ import annotations

import contextlib
import importlib.util
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ...engine.checkpoints.checkpoint import read_config, read_tokenizer
from ...errors import AssetError, ConfigError, did_you_mean
from ...scaling import hf as hf_config
from ...scaling.lengths import parse_length
from ..data import load_text, tokenize_documents
from ..runs.result import environment
from .engine import EngineSpec
from .timing import TimingResult, time_engines
from .worker import ProcessWorker

HF_DTYPES = ("float32", "bfloat16", "float16")

_NEEDED = {"llama.cpp": ("llama_cpp", "pip install 'ropewalk[llama-cpp]'")}


def parse_against(text: str) -> list[tuple[str, str | None]]:
    """Engines to compare with and their dtypes; None is the usual ones: "hf,llama.cpp:q8_0" names
    one of each.

    Raises:
        ConfigError: no such peer or dtype, or its package is not installed.
    """
    from ...engine.exports.gguf_write import GGUF_DTYPES

    known = {"hf": HF_DTYPES, "llama.cpp": tuple(GGUF_DTYPES)}
    peers = []
    for part in text.split(","):
        kind, colon, dtype = part.strip().partition(":")
        if kind not in known:
            raise ConfigError(f"unknown peer {kind!r}.{did_you_mean(kind, known)}")
        if colon and dtype not in known[kind]:
            raise ConfigError(f"unknown dtype {dtype!r} of {kind}.{did_you_mean(dtype, known[kind])}")
        if kind in _NEEDED:
            module, command = _NEEDED[kind]
            if importlib.util.find_spec(module) is None:
                raise ConfigError(f"{kind} is not installed; {command}, or leave it out of --against")
        peers.append((kind, dtype or None))
    return peers


def engine_specs(
    model: str, peers: Sequence[tuple[str, str | None]], *, dtype: str, context: int, room: int, threads: int
) -> list[EngineSpec]:
    """Ropewalk and then the peers, each once; GGUF files that are missing are written into the
    cache.

    Args:
        model: as `load` takes it.
        peers: from `parse_against`. Without a dtype, llama.cpp runs in bf16 and q8_0; hf in
            bfloat16, in the dtype that ropewalk was given, and in float32 on a CPU without bfloat16
            arithmetic.
        dtype: ropewalk's, or "auto".

    Raises:
        RopewalkError: the model cannot be had, or not be written to GGUF.
    """
    import torch

    from ...engine.exports.gguf_write import cached_gguf

    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = model_folder(model)
    specs = [("ropewalk", dtype, model)]
    for kind, chosen in peers:
        for kind_dtype in [chosen] if chosen else _usual(kind, dtype, device):
            source = str(cached_gguf(folder, kind_dtype)) if kind == "llama.cpp" else str(folder)
            specs.append((kind, kind_dtype, source))
    return [
        EngineSpec(kind=kind, dtype=chosen, source=source, context=context, room=room, threads=threads, device=device)
        for kind, chosen, source in dict.fromkeys(specs)
    ]


def _usual(kind: str, dtype: str, device: str) -> list[str]:
    from ...engine.load import cpu_has_bfloat16

    if kind == "llama.cpp":
        return ["bf16", "q8_0"]
    usual = {"bfloat16", dtype} & {*HF_DTYPES}
    if device == "cpu" and not cpu_has_bfloat16():
        usual.add("float32")
    return sorted(usual)


def model_folder(model: str) -> Path:
    """The folder of a model's checkpoint; one from the hub is downloaded, or found in the hub's
    cache.

    Raises:
        AssetError: there is no such model.
    """
    from ...engine.checkpoints.source import resolve

    source = resolve(model)
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.jinja", "*.model"]
    try:
        return Path(snapshot_download(source, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise AssetError(
            f"{model!r} is not a built-in model, a folder or a .gguf file, and the hub did not give it ({reason}); "
            "check the name, or give the folder of a model that is here"
        ) from error


TEXT = "pydoc"  # comes with Python, and is longer than any usual context


def measure(
    model: str,
    against: str,
    *,
    lengths: Sequence[str],
    repeats: int,
    prefill_repeats: int,
    new_tokens: int,
    dtype: str,
    threads: int | None,
    console: Console,
) -> tuple[TimingResult, dict[str, Any]]:
    """Time ropewalk and the peers on one text.

    Args:
        model: as `load` takes it.
        against: the peers, as `--against` takes them.
        lengths: contexts, as `parse_length` takes them.
        new_tokens: decoded in every round.
        threads: of every engine; None: torch's own number.

    Returns:
        What was found, and the machine, settings and versions, as JSON can hold them.

    Raises:
        RopewalkError: a peer is unknown or not installed, or an engine cannot run the model.
    """
    peers = parse_against(against)
    folder = model_folder(model)
    config = read_config(str(folder))
    trained = next(iter(hf_config.read(config.get_text_config()).values())).max_length
    contexts = sorted({parse_length(length, trained) for length in lengths})
    if threads is not None:
        torch.set_num_threads(threads)
    specs = engine_specs(
        model, peers, dtype=dtype, context=contexts[-1], room=new_tokens, threads=torch.get_num_threads()
    )
    text = _text(folder, contexts[-1] + new_tokens)
    memory, traffic = Memory(specs[0].device), Traffic(config)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with contextlib.ExitStack() as stack, Progress(*columns, console=console, transient=True) as progress:
        opening = progress.add_task("", total=len(specs))
        workers = []
        for spec in specs:
            progress.update(opening, description=f"loading {spec.name}")
            workers.append(stack.enter_context(ProcessWorker(spec)))
            progress.advance(opening)
        progress.remove_task(opening)
        result = time_engines(
            workers,
            text,
            contexts,
            new_tokens=new_tokens,
            repeats=repeats,
            prefill_repeats=prefill_repeats,
            bandwidth=memory.bandwidth,
            step_bytes=traffic.step_bytes,
            progress=progress,
        )
        versions = {name: version for worker in reversed(workers) for name, version in worker.versions.items()}
    machine = environment()
    about = {
        "model": Path(model).name,
        "cpu": machine["cpu"],
        "device": machine["device"],
        "threads": torch.get_num_threads(),
        "new_tokens": new_tokens,
        "versions": {"python": machine["python"], **versions},
    }
    return result, about


def _text(folder: Path, needed: int) -> list[int]:
    """Token ids of a text; one that is too short begins anew."""
    tokenizer = read_tokenizer(folder)
    ids = tokenize_documents(load_text(TEXT), tokenizer, limit_tokens=needed)[0]
    return (ids * -(-needed // len(ids)))[:needed]


READ_BYTES = 256 * 2**20
"""Far more than any cache holds."""

_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "int8": 1.0}
_BYTES |= {"f32": 4.0, "bf16": 2.0, "f16": 2.0, "q8_0": 34 / 32}  # a scale of 2 bytes for 32 weights
"""Bytes of a number, as torch and as GGUF call its type."""


class Memory:
    """Memory of one device, read over and over.

    Args:
        device: "cpu", which torch's threads read together, or "cuda".
    """

    def __init__(self, device: str = "cpu") -> None:
        self._numbers = torch.ones(READ_BYTES // 4, dtype=torch.float32, device=device)

    def bandwidth(self, tries: int = 3) -> float:
        """Bytes a second, the best of `tries` sums."""
        best = float("inf")
        for _ in range(tries):
            started = time.perf_counter()
            self._numbers.sum().item()  # item() waits for the device
            best = min(best, time.perf_counter() - started)
        return READ_BYTES / best


class Traffic:
    """What a decode step of a model has to read: every weight once, and the keys and values of the
    past.

    Of the input embedding one row is read, unless it is the output matrix too. All layers are taken
    to see the whole past, and all experts of a mixture to be read.

    Args:
        config: of a transformers model.
    """

    def __init__(self, config: Any) -> None:
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        config = config.get_text_config()
        self.weights: int = sum(parameter.numel() for parameter in model.parameters())
        if not config.tie_word_embeddings:
            self.weights -= model.get_input_embeddings().weight.numel()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.cached: int = 2 * config.num_hidden_layers * heads * dim

    def step_bytes(self, dtype: str, cache_dtype: str, length: float) -> float:
        """Bytes that a step behind `length` tokens reads.

        Args:
            dtype: of the weights, as torch or as GGUF calls it.
            cache_dtype: of the keys and values.
        """
        return self.weights * _BYTES[dtype] + length * self.cached * _BYTES[cache_dtype]
