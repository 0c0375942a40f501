"""The comparison of ropewalk with other engines, from the option `--against` to the result."""

from __future__ import annotations

import contextlib
import importlib.util
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ...engine.checkpoints.checkpoint import read_config, read_tokenizer
from ...engine.checkpoints.gguf_file import GgufFile, needed_tensors
from ...engine.checkpoints.source import gguf_file, resolve
from ...engine.hf_model import key_shape
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
    """Engines and dtypes for a comparison, from a string such as "hf,llama.cpp:q8_0". None: the
    usual dtypes.

    Raises:
        ConfigError: unknown engine or dtype, or its package is not installed.
    """
    from ...engine.exports.gguf_write import GGUF_DTYPES

    known = {"hf": HF_DTYPES, "llama.cpp": tuple(GGUF_DTYPES)}
    engines = []
    for part in text.split(","):
        kind, colon, dtype = part.strip().partition(":")
        if kind not in known:
            raise ConfigError(f"unknown engine {kind!r}.{did_you_mean(kind, known)}")
        if colon and dtype not in known[kind]:
            raise ConfigError(f"unknown dtype {dtype!r} of {kind}.{did_you_mean(dtype, known[kind])}")
        if kind in _NEEDED:
            module, command = _NEEDED[kind]
            if importlib.util.find_spec(module) is None:
                raise ConfigError(f"{kind} is not installed; {command}, or leave it out of --against")
        engines.append((kind, dtype or None))
    return engines


def engine_specs(
    model: str, engines: Sequence[tuple[str, str | None]], *, dtype: str, context: int, room: int, threads: int
) -> list[EngineSpec]:
    """ropewalk and then the other engines, each once. Missing GGUF files are written into the
    cache.

    Args:
        model: as for `load`.
        engines: from `parse_against`. Without a dtype, llama.cpp runs the GGUF file of `model` if
            there is one and `dtype` is "auto", as ropewalk does, and else bf16 and q8_0. hf runs in
            bfloat16, in the dtype of ropewalk, and on a CPU without bfloat16 arithmetic also in
            float32.
        dtype: of ropewalk, or "auto".

    Raises:
        RopewalkError: the model cannot be loaded, or cannot be written to GGUF.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    specs = [("ropewalk", dtype, model)]
    for kind, chosen in engines:
        if kind == "hf":
            dtypes = [chosen] if chosen else _usual_of_hf(dtype, device)
            specs += [(kind, each, str(model_folder(model))) for each in dtypes]
        else:
            specs += [(kind, *file) for file in _files_of_llama_cpp(model, chosen, dtype)]
    return [
        EngineSpec(kind=kind, dtype=chosen, source=source, context=context, room=room, threads=threads, device=device)
        for kind, chosen, source in dict.fromkeys(specs)
    ]


def _files_of_llama_cpp(model: str, chosen: str | None, dtype: str) -> Iterator[tuple[str, str]]:
    """The formats of each GGUF file that llama.cpp shall run, and its path."""
    from ...engine.exports.gguf_write import cached_gguf

    if chosen is None and dtype == "auto" and (file := gguf_file(model)) is not None:
        yield GgufFile(file).formats, str(file)
        return
    folder = model_folder(model)
    for each in [chosen] if chosen else ["bf16", "q8_0"]:
        yield each, str(cached_gguf(folder, each))


def _usual_of_hf(dtype: str, device: str) -> list[str]:
    from ...engine.load import cpu_has_bfloat16

    usual = {"bfloat16", dtype} & {*HF_DTYPES}
    if device == "cpu" and not cpu_has_bfloat16():
        usual.add("float32")
    return sorted(usual)


def model_folder(model: str) -> Path:
    """The folder of a model's checkpoint. A hub model is downloaded unless it is in the hub's
    cache.

    Raises:
        AssetError: there is no such model.
    """
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
            f"{model!r} is not a built-in model, a folder or a .gguf file, and the hub does not have it ({reason}); "
            "check the name, or give the folder of a local model"
        ) from error


TEXT = "pydoc"  # comes with Python, and is longer than usual contexts


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
    """Time ropewalk and the other engines on one text.

    Args:
        model: as for `load`.
        against: the other engines, as in `--against`.
        lengths: contexts, as for `parse_length`.
        new_tokens: number of decoded tokens per round.
        threads: of every engine. None: torch's default.

    Returns:
        The timings, and the machine, settings and versions as JSON values.

    Raises:
        RopewalkError: an engine is unknown or not installed, or cannot run the model.
    """
    engines = parse_against(against)
    folder = model_folder(model)
    config = read_config(str(folder))
    trained = next(iter(hf_config.read(config.get_text_config()).values())).max_length
    contexts = sorted({parse_length(length, trained) for length in lengths})
    if threads is not None:
        torch.set_num_threads(threads)
    specs = engine_specs(
        model, engines, dtype=dtype, context=contexts[-1], room=new_tokens, threads=torch.get_num_threads()
    )
    text = _text(folder, contexts[-1] + new_tokens)
    memory, traffic = Memory(specs[0].device), Traffic(config, gguf_file(model))
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
            device=specs[0].device,
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
    """Token ids of a text. A text that is too short is repeated."""
    tokenizer = read_tokenizer(folder)
    ids = tokenize_documents(load_text(TEXT), tokenizer, limit_tokens=needed)[0]
    return (ids * -(-needed // len(ids)))[:needed]


READ_BYTES = 256 * 2**20
"""Much more than any cache."""

GPU_READ_BYTES = 4 * 2**30
"""A GPU reads them in a millisecond or more, beside which the start of a kernel does not count."""

_BYTES = {"float64": 8.0, "float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "int8": 1.0}
_BYTES |= {"f32": 4.0, "bf16": 2.0, "f16": 2.0, "q8_0": 34 / 32}  # each 32 weights have a scale of 2 bytes
"""Bytes of a number, by the name of its type in torch, or of a GGUF file that ropewalk writes."""


class Memory:
    """A block of memory on one device, for measuring the bandwidth.

    Args:
        device: "cpu", where all of torch's threads read it, or "cuda".
    """

    def __init__(self, device: str = "cpu") -> None:
        self._bytes = READ_BYTES if device == "cpu" else GPU_READ_BYTES
        self._numbers = torch.ones(self._bytes // 4, dtype=torch.float32, device=device)

    def bandwidth(self, tries: int = 3) -> float:
        """Bytes per second, the best of `tries` sums."""
        best = float("inf")
        for _ in range(tries):
            started = time.perf_counter()
            self._numbers.sum().item()  # item() waits for the device
            best = min(best, time.perf_counter() - started)
        return self._bytes / best


class Traffic:
    """What a decode step of a model reads: every weight once, and all cached keys and values.

    Of the input embedding only one row is read, unless it is also the output matrix. All layers are
    assumed to see the whole past, and all experts of a mixture are assumed to be read.

    Args:
        config: of a transformers model.
        file: the GGUF file of the model, which engines may run as it is.
    """

    def __init__(self, config: Any, file: Path | None = None) -> None:
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        config = config.get_text_config()
        self.weights: int = sum(parameter.numel() for parameter in model.parameters())
        if not config.tie_word_embeddings:
            self.weights -= model.get_input_embeddings().weight.numel()
        heads, dim = key_shape(config)
        self.cached: int = 2 * config.num_hidden_layers * heads * dim
        self._of_file = 0 if file is None else _bytes_read(GgufFile(file), config)

    def step_bytes(self, dtype: str, cache_dtype: str, length: float) -> float:
        """Bytes that a step after `length` tokens reads.

        Args:
            dtype: of the weights, as torch or GGUF calls it; any other name stands for the weights of the file.
            cache_dtype: of the keys and values.
        """
        weights = self.weights * _BYTES[dtype] if dtype in _BYTES else self._of_file
        return weights + length * self.cached * _BYTES[cache_dtype]


def _bytes_read(file: GgufFile, config: Any) -> int:
    """The bytes of the weights that a step reads."""
    tied = config.tie_word_embeddings
    names = needed_tensors(file, config, tied=tied) - (set() if tied else {"token_embd.weight"})
    return sum(int(file.tensors[name].n_bytes) for name in names)
