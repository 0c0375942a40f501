"""What a position map costs: its attention compared with plain attention and with the public form,
and a decode step.

Everything is timed in rounds, so that a drift of the machine's speed affects all alike. Ratios are
of runs in the same round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from statistics import median

import torch
from rich.progress import Progress
from torch import Tensor

from ...engine.attention.banded import banded_attention
from ...engine.attention.causal import causal_attention
from ...engine.attention.kernel import AttentionScore
from ...engine.attention.rotation import Layout, angles, cos_sin
from ...engine.attention.rows import KeyRun
from ...engine.hf_model import input_device
from ...engine.model import Model
from ...engine.prefill import prefill
from ...engine.rotary_site import RotarySite, primary_rotary
from ...engine.runners.rotation_table import LayerGroup, RotationTable
from ...engine.runners.runner import CHUNK
from ...errors import ConfigError
from ...scaling import Scaler
from ...scaling.band import pair_positions

PLAIN = "plain attention"


@dataclass(frozen=True, kw_only=True)
class MapCost:
    """Seconds of one operation, round by round, and its ratio to plain attention or to `none`.

    `what` is "prefill attention" (one layer), "prefill attention, public form", or "decode" (a step
    of the whole model).
    """

    what: str
    scaler: str
    length: int
    seconds: list[float]
    ratio: float
    lowest: float
    highest: float


def naive_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, scaler: Scaler, site: RotarySite) -> Tensor:
    """A position map as in public code: the full square for every band, one softmax, n x n memory."""
    n, layout = q.shape[2], Layout(0, site.configured.rope.dim, interleaved=False)
    inv_freq, factor = site.configured.effective(scaler).frequencies(site.configured.rope, n)
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    i = torch.arange(n, device=q.device)
    scores: Tensor | None = None
    for band in site.bands(scaler, n):
        rotated_q = layout.rotate(q, angles(pair_positions(band.query, i), inv_freq, like=q))
        rotated_k = layout.rotate(k, angles(pair_positions(band.key, i), inv_freq, like=k))
        square = rotated_q @ rotated_k.transpose(-1, -2)
        if scores is None:
            scores = square
        else:
            torch.where((band.start(i)[:, None] <= i) & (i < band.stop(i)[:, None]), square, scores, out=scores)
    assert scores is not None
    weight = site.logit_factor(scaler, i)[:, None] * scale * factor**2
    scores.mul_(weight.to(scores.dtype)).masked_fill_(i > i[:, None], -torch.inf)
    return torch.softmax(scores, -1) @ v


def attention_costs(
    model: Model, scalers: list[Scaler], lengths: list[int], *, repeats: int, naive: bool, progress: Progress
) -> Iterator[MapCost]:
    """Prefill attention of one layer with the sizes of `model`, in the engine's chunks."""
    config, site = model.hf.config.get_text_config(), primary_rotary(model.sites)
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    layout = Layout(0, site.configured.rope.dim, interleaved=False)
    score = AttentionScore(scale=dim**-0.5)
    device = input_device(model.hf)
    dtype = torch.float32 if device.type == "cpu" else model.hf.dtype
    for n in lengths:
        generator = torch.Generator().manual_seed(0)
        drawn = (torch.randn(1, h, n, dim, generator=generator) for h in (heads, kv_heads, kv_heads))
        q, k, v = (numbers.to(device, dtype) for numbers in drawn)
        operations: dict[tuple[str, str], Callable[[], object]] = {}
        for scaler in [Scaler(), *scalers]:
            table = RotationTable(LayerGroup(site, layout, None), site, scaler, n)
            name = str(scaler) if scaler.parts else PLAIN
            if scaler.parts:
                operations["prefill attention", name] = _banded(q, k, v, score, layout, table)
            else:
                operations["prefill attention", name] = _plain(q, k, v, score, layout, site)
            if naive and scaler.parts:
                operations["prefill attention, public form", name] = _naive(q, k, v, score.scale, scaler, site)
        yield from _time_in_rounds(operations, ("prefill attention", PLAIN), n, repeats, progress, device)


def decode_costs(
    model: Model, scalers: list[Scaler], lengths: list[int], *, repeats: int, progress: Progress
) -> Iterator[MapCost]:
    """A decode step of the whole model with `length` tokens in its cache, under every scaler and
    under `none`."""
    before, device = model.rope, input_device(model.hf)
    try:
        for n in lengths:
            operations: dict[tuple[str, str], Callable[[], object]] = {}
            for scaler in [Scaler(), *scalers]:
                operations["decode", str(scaler)] = _decoding(model, scaler, n, progress)
            yield from _time_in_rounds(
                operations, ("decode", "none"), n, repeats, progress, device, _switch(model, operations)
            )
    finally:
        model.rope = before


def _decoding(model: Model, scaler: Scaler, n: int, progress: Progress) -> Callable[[], object]:
    """A decode step after `n` tokens that were read under `scaler`."""
    model.rope = scaler
    ids = torch.randint(0, model.vocabulary_size, (n,), generator=torch.Generator().manual_seed(0)).tolist()
    cache = model.new_cache(n + 64)
    task = progress.add_task(f"reading {n} tokens, {scaler}", total=n)
    with model.running(n) as runner:
        prefill(runner, ids, cache, lambda _, count: progress.advance(task, count))
    progress.remove_task(task)
    return lambda: runner.forward(ids[:1], cache, logits_to_keep=1)


def _switch(model: Model, operations: dict[tuple[str, str], Callable[[], object]]) -> Callable[[str], None]:
    """Set a scaler and run one step that is not timed."""

    def switch(name: str) -> None:
        model.rope = name
        operations["decode", name]()

    return switch


def _time_in_rounds(
    operations: dict[tuple[str, str], Callable[[], object]],
    baseline: tuple[str, str],
    length: int,
    repeats: int,
    progress: Progress,
    device: torch.device,
    prepare: Callable[[str], None] = lambda _: None,
) -> Iterator[MapCost]:
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in operations}
    task = progress.add_task(f"timing at {length} tokens", total=repeats * len(operations))
    for round_ in range(repeats + 1):  # the first round warms up
        for key, run in operations.items():
            if round_ == 0 and key[0].endswith("public form"):
                continue
            prepare(key[1])
            _wait_for(device)
            started = time.perf_counter()
            run()
            _wait_for(device)
            if round_:
                seconds[key].append(time.perf_counter() - started)
                progress.advance(task)
    progress.remove_task(task)
    for (what, scaler), seconds_each in seconds.items():
        ratios = [first / other for first, other in zip(seconds_each, seconds[baseline], strict=True)]
        yield MapCost(
            what=what,
            scaler=scaler,
            length=length,
            seconds=seconds_each,
            ratio=median(ratios),
            lowest=min(ratios),
            highest=max(ratios),
        )


def _wait_for(device: torch.device) -> None:
    """A GPU works on after a call has returned."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _banded(
    q: Tensor, k: Tensor, v: Tensor, score: AttentionScore, layout: Layout, table: RotationTable
) -> Callable[[], object]:
    n = q.shape[2]
    chunks = []
    for start in range(0, n, CHUNK):
        stop = min(n, start + CHUNK)
        run = KeyRun(None, 0, stop - start, 0, stop, 0)
        chunks.append((start, stop, [(run, [table.segment(run)])]))
    stored = cos_sin(table.key_phases(torch.arange(n)), like=k)

    def run_all() -> None:
        keys = layout.rotate(k, stored)
        for start, stop, work in chunks:
            banded_attention(q[:, :, start:stop], keys[:, :, :stop], v[:, :, :stop], score, layout, work)

    return run_all


def _plain(
    q: Tensor, k: Tensor, v: Tensor, score: AttentionScore, layout: Layout, site: RotarySite
) -> Callable[[], object]:
    n, inv_freq = q.shape[2], site.configured.rope.theta
    cos_sin = angles(torch.arange(n, dtype=torch.float64)[:, None], inv_freq, like=q)

    def run() -> None:
        rotated = layout.rotate(k, cos_sin)
        rotated_q = layout.rotate(q, cos_sin)
        for start in range(0, n, CHUNK):
            stop = min(n, start + CHUNK)
            causal_attention(rotated_q[:, :, start:stop], rotated[:, :, :stop], v[:, :, :stop], score)

    return run


def _naive(q: Tensor, k: Tensor, v: Tensor, scale: float, scaler: Scaler, site: RotarySite) -> Callable[[], object]:
    return lambda: naive_attention(q, k, v, scale, scaler, site)


def check_maps(scalers: list[Scaler]) -> None:
    """Refuse scalers that leave attention unchanged: they cost the same as `none`."""
    for scaler in scalers:
        if not scaler.member("positions"):
            raise ConfigError(
                f"{scaler} has no position map: it runs in the model's own attention, without cost; give a map such as "
                "rerope:2k"
            )


def as_json(costs: list[MapCost]) -> dict[str, object]:
    """All costs with torch's version and the number of threads, for one line of JSON."""
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "costs": [asdict(cost) for cost in costs],
    }
