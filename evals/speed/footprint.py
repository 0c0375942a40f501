"""Peak memory of the perplexity of a long text: this engine beside transformers, each in a process of its own.

python -m ropewalk.evals.speed.footprint smollm2-135m --lengths 8k,32k --dtype bfloat16 --rope yarn:4 --hf
"""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import click

TARGET = 1024
"""Tokens scored: the last ones."""


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Memory of one process that scored one text, MB (10^6 bytes).

    Args:
        imports: resident before the model was loaded.
        loaded: most resident while it was.
        peak: most resident in the end.
        weights, cache: what they take by themselves.
        loss: nats per token of the last `TARGET` tokens.
    """

    engine: str
    length: int
    seconds: float
    imports: float
    loaded: float
    peak: float
    weights: float
    cache: float
    loss: float

    @property
    def rest(self) -> float:
        """What is held beyond weights and cache: the libraries, the buffers of a chunk, the allocator's spare."""
        return self.peak - self.weights - self.cache


@dataclass(frozen=True)
class _Loaded:
    """An engine with its model: its name, the bytes of weights and of keys and values, and how it scores tokens."""

    name: str
    weights: int
    cache: int
    loss: Callable[[], float]


def _ropewalk(model: str, ids: list[int], dtype: str, rope: str) -> _Loaded:
    from ...engine.load import load

    loaded = load(model, rope, dtype=dtype, max_length=len(ids))
    return _Loaded(
        f"ropewalk {loaded.precision}",
        loaded.hf.get_memory_footprint(),
        loaded.bytes_per_token * len(ids),
        lambda: -float(loaded.score_ids(ids, len(ids) - TARGET).mean()),
    )


def _transformers(model: str, ids: list[int], dtype: str, _: str) -> _Loaded:
    """The loss of transformers' own forward, as its perplexity page computes it: all logits at once."""
    import torch

    from ...engine.checkpoints.checkpoint import read_config, read_weights
    from ...engine.checkpoints.source import resolve

    source = resolve(model)
    hf = read_weights(source, read_config(source), dtype=getattr(torch, dtype))
    labels = torch.tensor([[-100] * (len(ids) - TARGET) + ids[-TARGET:]])

    def loss() -> float:
        with torch.inference_mode():
            return float(hf(torch.tensor([ids]), labels=labels, use_cache=False).loss)

    return _Loaded(f"transformers {dtype}", hf.get_memory_footprint(), 0, loss)


_ENGINES = {"ropewalk": _ropewalk, "transformers": _transformers}


def _measure(engine: str, model: str, ids: list[int], dtype: str, rope: str, connection: Any) -> None:
    import transformers  # noqa: F401  (counts as a library, not as loading)

    from .memory import peak_resident_mb

    imports = peak_resident_mb()
    loaded = _ENGINES[engine](model, ids, dtype, rope)
    once_loaded, started = peak_resident_mb(), time.perf_counter()
    loss = loaded.loss()
    found = Footprint(
        engine=loaded.name,
        length=len(ids),
        seconds=time.perf_counter() - started,
        imports=imports,
        loaded=once_loaded,
        peak=peak_resident_mb(),
        weights=loaded.weights / 1e6,
        cache=loaded.cache / 1e6,
        loss=loss,
    )
    connection.send(found)


def measure(engine: str, model: str, ids: list[int], dtype: str, rope: str) -> Footprint:
    """Score `ids` in a new process, which "ropewalk" or "transformers" has for itself."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_measure, args=(engine, model, ids, dtype, rope, theirs))
    process.start()
    theirs.close()
    try:
        found: Footprint = ours.recv()
    except EOFError:
        process.join()
        raise click.ClickException(f"{engine} died at {len(ids)} tokens (exit code {process.exitcode})") from None
    process.join()
    return found


@click.command()
@click.argument("model")
@click.option("--lengths", default="8k,32k", show_default=True)
@click.option("--text", default="kjv", show_default=True, help="As of `ropewalk ppl`.")
@click.option("--dtype", default="bfloat16", show_default=True)
@click.option("--rope", default="none", show_default=True, help="Of ropewalk; transformers runs the model as it is.")
@click.option("--hf", is_flag=True, help="Measure transformers too.")
def main(model: str, lengths: str, text: str, dtype: str, rope: str, hf: bool) -> None:
    """Score the last 1024 tokens of a text of each length, and print the memory that it took."""
    from ...engine.checkpoints.checkpoint import read_tokenizer
    from ...engine.checkpoints.source import resolve
    from ...errors import RopewalkError
    from ...scaling.lengths import format_length, parse_length
    from ..data import load_text, tokenize_documents

    try:
        contexts = [parse_length(length) for length in lengths.split(",")]
        if min(contexts) <= TARGET:
            raise click.UsageError(f"--lengths {lengths}: each must be more than the {TARGET} tokens that are scored")
        tokenizer = read_tokenizer(resolve(model))
        ids = tokenize_documents(load_text(text), tokenizer, limit_tokens=max(contexts))[0]
        if len(ids) < max(contexts):
            raise click.ClickException(f"{text} holds {len(ids)} tokens of the {max(contexts)} that are asked for")
        found = []
        for length in contexts:
            for engine in ("ropewalk", "transformers") if hf else ("ropewalk",):
                one = measure(engine, model, ids[:length], dtype, rope)
                found.append(one)
                click.echo(
                    f"{format_length(length):>5}  {one.engine:<44} peak {one.peak:7.0f} MB = weights {one.weights:.0f} "
                    f"+ cache {one.cache:.0f} + {one.rest:.0f} (libraries {one.imports:.0f}; {one.loaded:.0f} once "
                    f"loaded)  {one.seconds:.0f} s  loss {one.loss:.4f}"
                )
    except RopewalkError as error:
        raise click.ClickException(str(error)) from error
    click.echo(json.dumps([asdict(one) | {"rest": one.rest} for one in found]))


if __name__ == "__main__":
    main()
