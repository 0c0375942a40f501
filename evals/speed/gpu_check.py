"""A check of a GPU: whether the engine is right on it, how fast it is, and how fast the memory would let it be.

Every part has a share of the time, and stops when it is used up. A part that fails does not stop the rest.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from ...engine.cache import is_lack_of_memory
from ...engine.prefill import prefill
from ...engine.rotary_site import rotary_sites
from ...engine.runners.choose import RunnerOptions, choose_runner
from ...engine.runners.family import FAMILIES
from ...engine.runners.gpu.reference import TorchOps
from ...engine.runners.gpu.runner import GpuRunner
from ...engine.runners.runner import CHUNK, Runner
from ...errors import ConfigError, OutOfMemory, did_you_mean
from ...scaling.lengths import format_length
from ...scaling.spec import parse
from .against import Memory, Traffic

Row = dict[str, Any]
_Times = Callable[[PreTrainedModel, Runner, list[int], float], Row]

_LLAMA = {"model_type": "llama", "max_position_embeddings": 8192, "rope_parameters": {"rope_theta": 5e5}}
GEOMETRIES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        **_LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "llama-3.2-1b": {
        **_LLAMA,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "tiny": {
        **_LLAMA,
        "max_position_embeddings": 64,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
    },
}
"""Sizes of models, whose weights are random: speed does not depend on them."""

SCALERS = (
    "none",
    "yarn:4",
    "dynamic-ntk",
    "logn",
    "rerope:20|logn",
    "leaky-rerope:20,k=4",
    "self-extend:4,window=20",
    "dual-chunk",
    "string:window=5",
    "jet-long:20",
    "sink-window:30",
)
_SMALL = {
    **{name: value for name, value in GEOMETRIES["tiny"].items() if name != "rope_parameters"},
    "initializer_range": 0.25,  # large, so that attention differs from key to key
    "head_dim": 16,
    "num_hidden_layers": 3,
    "sliding_window": 24,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_MIXED = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
_LAYERS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "phi3": {"sliding_window": None},
    "ministral3": {"sliding_window": None},
    "ministral": _MIXED,
    "gemma2": _MIXED,
    "gemma3_text": _MIXED,
}
"""Families whose layers have windows: some of their layers have none, so that scalers act on them."""
_TEXT = 140  # tokens of the comparison, whose models are trained at 64
_PIECES = (50, 1, 1, 5, 30, 1)  # tokens read at a time; small ones are steps
_LENGTHS = (70, 33)  # of rows of a batch
MOST_DIFFERENCE = {"float32": 1e-3, "bfloat16": 0.1}
"""Of the logits from those in float64: Euclidean norm, relative. The CPU's engine has 0.004 to 0.04 in bfloat16."""

_STEPS = 16  # timed decode steps
_ROWS = 8  # of a batch
_MAPS = ("rerope:0.25x", "self-extend:16,window=0.25x", "dual-chunk")


@dataclass
class GpuCheck:
    """The check of one device.

    Args:
        device: "cuda", or "cpu" to try the check itself.
        geometry: a name of `GEOMETRIES`, for the speeds.
        lengths: contexts in tokens, ascending.
        seconds: for everything.
        report: gets every row when it is there.

    Attributes:
        rows: what was measured; `part` names the part of each.
    """

    device: str
    geometry: str
    lengths: Sequence[int]
    seconds: float
    report: Callable[[Row], None] = lambda _: None
    rows: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.geometry not in GEOMETRIES:
            raise ConfigError(f"unknown geometry {self.geometry!r}.{did_you_mean(self.geometry, GEOMETRIES)}")
        self._end = time.monotonic() + self.seconds

    def run(self) -> None:
        """Run all parts. What they find is in `rows`."""
        self._part("forms", 0.2, self._forms())
        self._part("equality", 0.4, self._equality())
        self._part("speed", 1.0, self._speed())

    @property
    def failures(self) -> list[Row]:
        """Rows that say that something is wrong."""
        return [
            row
            for row in self.rows
            if "failed" in row
            or (self.device == "cuda" and row.get("engine") is False)  # transformers' modules run it, and say why
            or not row.get("difference", 0) <= MOST_DIFFERENCE.get(row.get("dtype", ""), 0)
        ]

    def _part(self, name: str, share: float, rows: Iterator[Row]) -> None:
        """Run a part until its share of the time that is left is used up."""
        began = time.monotonic()
        end = began + share * (self._end - began)
        try:
            for row in rows:
                self._add({"part": name, **row})
                if time.monotonic() > end:
                    self._add({"part": name, "stopped": "its time is used up"})
                    return
        except Exception as error:  # a device can fail in any way, and the other parts are of use then
            self._add({"part": name, "failed": _named(error)})
        finally:
            rows.close()  # type: ignore[attr-defined]
            self._free()

    def _free(self) -> None:
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def _add(self, row: Row) -> None:
        self.rows.append(row)
        self.report(row)

    def _forms(self) -> Iterator[Row]:
        """Rows of a batch and a tree of tokens, also with int8 weights and cache, of one small model."""
        exact, paths = small_model("llama"), [(5,), (9,), (5, 7), (5, 7, 1)]
        for numbers, weights, cache in (("own", "own", "auto"), ("int8", "int8", "int8")):
            hf = _copied(exact, self.device, torch.bfloat16)
            hf_64 = _copied(hf, "cpu", torch.float64)
            reference = GpuRunner(hf_64, rotary_sites(hf_64), TorchOps(), weights, cache)  # type: ignore[arg-type]
            options = RunnerOptions(weights=weights, cache=cache)  # type: ignore[arg-type]
            runner = choose_runner(hf, rotary_sites(hf), options)
            about = {"family": "llama", "dtype": "bfloat16", "numbers": numbers}
            yield {**about, "run_by": runner.how, "engine": runner.is_compiled}
            for spec in ("none", "rerope:20|logn") if runner.is_compiled else ():
                rows: dict[str, list[Tensor]] = {"rows": [], "tree": []}
                for each in (reference, runner):
                    each.use(parse(spec), None)
                    caches = [each.new_cache(length) for length in _LENGTHS]
                    for held, length in zip(caches, _LENGTHS, strict=True):
                        each.forward(_text(length), held, 1)
                    rows["tree"].append(each.tree(paths, caches[0]).double().cpu())
                    for token in (7, 8):  # the second step uses the graph of the first
                        logits = each.step([([token], held) for held in caches])
                    rows["rows"].append(logits.double().cpu())
                for form, (expected, found) in rows.items():
                    yield {**about, "form": form, "rope": spec, "difference": _difference(found, expected)}

    def _equality(self) -> Iterator[Row]:
        """Logits of small models of every family under every kind of scaler, against the same in float64 on the CPU."""
        for family in FAMILIES:
            try:
                yield from self._of_family(family)
            except Exception as error:  # other families may run
                yield {"family": family, "failed": _named(error)}

    def _of_family(self, family: str) -> Iterator[Row]:
        exact, ids = small_model(family), _text(_TEXT)
        dtypes = {name: _copied(exact, self.device, getattr(torch, name)) for name in MOST_DIFFERENCE}
        for dtype, hf in dtypes.items():
            reference = GpuRunner(hf_64 := _copied(hf, "cpu", torch.float64), rotary_sites(hf_64), TorchOps())
            runner = choose_runner(hf, rotary_sites(hf), RunnerOptions())
            yield {"family": family, "dtype": dtype, "run_by": runner.how, "engine": runner.is_compiled}
            for spec in SCALERS:
                scaler = parse(spec)
                reference.use(scaler, _TEXT)
                expected = reference.forward(ids, reference.new_cache(_TEXT), _TEXT)
                if runner.is_compiled:
                    runner.use(scaler, _TEXT)
                elif spec != "none":
                    continue
                difference = _difference(_in_pieces(runner, ids).double().cpu(), expected)
                if spec == "none":
                    untouched = expected
                effect = _difference(untouched, expected)
                yield {"family": family, "dtype": dtype, "rope": spec, "difference": difference, "effect": effect}

    def _speed(self) -> Iterator[Row]:
        """Prefill and decode at every length, beside transformers' modules and what the memory allows."""
        fields = GEOMETRIES[self.geometry]
        hf = random_model(fields, self.device, torch.bfloat16)
        traffic, bandwidth = Traffic(hf.config), Memory(self.device).bandwidth()
        yield {"geometry": self.geometry, "bandwidth_gb_s": bandwidth / 1e9}
        runner = choose_runner(hf, rotary_sites(hf), RunnerOptions())
        yield {"run_by": runner.how}
        vocabulary = fields["vocab_size"]
        for length in self.lengths:
            ids = [n * 7919 % vocabulary for n in range(length)]
            floor = traffic.step_bytes("bfloat16", "bfloat16", length) / bandwidth
            for engine, times in (("ropewalk", self._of_runner), ("transformers", self._of_transformers)):
                yield self._tried({"engine": engine, "length": length, "rope": "none"}, times, hf, runner, ids, floor)
            if length == self.lengths[0]:
                about = {"engine": "ropewalk", "length": length, "rope": "none", "rows": _ROWS}
                yield self._tried(about, self._of_rows, hf, runner, ids, floor)
            for spec in _MAPS if runner.is_compiled else ():
                runner.use(parse(spec, fields["max_position_embeddings"]), None)
                about = {"engine": "ropewalk", "length": length, "rope": spec}
                yield self._tried(about, self._of_runner, hf, runner, ids, floor)
            runner.use(parse("none"), None)

    def _tried(
        self, about: Row, times: _Times, hf: PreTrainedModel, runner: Runner, ids: list[int], floor: float
    ) -> Row:
        """A measurement. If it fails, its row says why, and the next can be tried."""
        try:
            with torch.inference_mode():
                return {**about, **times(hf, runner, ids, floor)}
        except Exception as error:
            if isinstance(error, OutOfMemory) or is_lack_of_memory(error):
                return {**about, "no_memory": True}
            return {**about, "failed": _named(error)}
        finally:
            self._free()

    def _of_runner(self, _: PreTrainedModel, runner: Runner, ids: list[int], floor: float) -> Row:
        warm_up = ids[: CHUNK * runner.chunk_factor]  # the driver loads kernels at their first use
        prefill(runner, warm_up, runner.new_cache(len(warm_up)))
        cache = runner.new_cache(len(ids) + _STEPS + 2)
        read = self._seconds(lambda: prefill(runner, ids, cache))
        steps = self._times(lambda: runner.forward([5], cache, 1))
        return self._measured(read, steps, floor)

    def _of_rows(self, _: PreTrainedModel, runner: Runner, ids: list[int], __: float) -> Row:
        caches = [runner.new_cache(len(ids) + _STEPS) for _ in range(_ROWS)]
        for cache in caches:
            prefill(runner, ids, cache)
        return {"step": median(self._times(lambda: runner.step([([5], cache) for cache in caches])))}

    def _of_transformers(self, hf: PreTrainedModel, _: Runner, ids: list[int], floor: float) -> Row:
        cache, batch = DynamicCache(config=hf.config), torch.tensor([ids], device=hf.device)

        def run(tokens: Tensor) -> Tensor:
            logits: Tensor = hf(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            return logits

        hf(input_ids=batch[:, :CHUNK], use_cache=False, logits_to_keep=1)
        read = self._seconds(lambda: run(batch))
        steps = self._times(lambda: run(batch[:, :1]))
        return self._measured(read, steps, floor)

    def _measured(self, read: float, steps: list[float], floor: float) -> Row:
        row: Row = {"prefill": read, "step": median(steps), "step_least": min(steps), "step_most": max(steps)}
        row["of_bandwidth"] = floor / row["step"]
        if self.device == "cuda":
            row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
            torch.cuda.reset_peak_memory_stats()
        return row

    def _seconds(self, run: Callable[[], Tensor]) -> float:
        """Seconds until the device has finished."""
        self._wait()
        began = time.perf_counter()
        run()
        self._wait()
        return time.perf_counter() - began

    def _times(self, run: Callable[[], Tensor]) -> list[float]:
        """Seconds of single steps, after two to warm up. The host reads the likeliest token of each."""
        steps = [self._seconds(lambda: run().argmax(-1).cpu()) for _ in range(_STEPS)]
        return steps[2:]

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def random_model(fields: dict[str, Any], device: str, dtype: torch.dtype) -> PreTrainedModel:
    """A model with random weights, the same each time on a device.

    Args:
        fields: of its config, with its `model_type`.
    """
    torch.manual_seed(0)
    config = AutoConfig.for_model(**copy.deepcopy(fields))
    with torch.device(device):
        hf: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return hf.eval()


def small_model(family: str) -> PreTrainedModel:
    """A small random model of a family, in float32 on the CPU."""
    return random_model({**_SMALL, **_LAYERS.get(family, {}), "model_type": family}, "cpu", torch.float32)


def _copied(hf: PreTrainedModel, device: str, dtype: torch.dtype) -> PreTrainedModel:
    """The same weights; rotary frequencies stay in float32."""
    other: PreTrainedModel = AutoModelForCausalLM.from_config(hf.config).to(device)
    for mine, its in zip(other.parameters(), hf.parameters(), strict=True):
        mine.data = its.data.to(device, dtype)
    return other.eval()


def _text(length: int) -> list[int]:
    return [n * 37 % 95 + 1 for n in range(length)]


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _in_pieces(runner: Runner, ids: list[int]) -> Tensor:
    """All logits of a text that is read in pieces."""
    cache, logits, at, turn = runner.new_cache(8), list[Tensor](), 0, 0
    while at < len(ids):
        piece = ids[at : at + _PIECES[turn % len(_PIECES)]]
        logits.append(runner.forward(piece, cache, len(piece)))
        at, turn = at + len(piece), turn + 1
    return torch.cat(logits)


def tables(check: GpuCheck) -> list[Table]:
    """The differences of every family, and the speeds."""
    right = Table("family", "dtype", "scalers", "largest difference", "limit", title="equality with float64")
    pairs = dict.fromkeys((row["family"], row["dtype"]) for row in check.rows if "difference" in row)
    for family, dtype in pairs:
        of_pair = [
            row["difference"]
            for row in check.rows
            if "difference" in row and (row["family"], row["dtype"]) == (family, dtype)
        ]
        right.add_row(family, dtype, str(len(of_pair)), f"{max(of_pair):.2g}", f"{MOST_DIFFERENCE[dtype]:g}")
    fast = Table("context", "engine", "scaler", "prefill", "step", "memory", "peak", title=check.geometry)
    for row in check.rows:
        if "prefill" in row:
            fast.add_row(
                format_length(row["length"]),
                row["engine"],
                row["rope"],
                f"{row['prefill']:.3g} s",
                f"{1000 * row['step']:.2f} ms",
                f"{row['of_bandwidth']:.0%}",
                f"{row['peak_gb']:.1f} GB" if "peak_gb" in row else "",
            )
        elif "no_memory" in row:
            rope = f"{row['rows']} rows" if "rows" in row else row["rope"]
            fast.add_row(format_length(row["length"]), row["engine"], rope, "no memory")
        elif "rows" in row and "step" in row:
            fast.add_row(
                format_length(row["length"]), row["engine"], f"{row['rows']} rows", "", f"{1000 * row['step']:.2f} ms"
            )
    return [right, fast]
