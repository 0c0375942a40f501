"""`export`: a model under a scaler, written so that other software runs it with the very same frequencies."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...errors import ConfigError, UnsupportedModel, did_you_mean
from ...scaling import hf, hf_write
from ...scaling.gguf_rope import GgufRope
from ...scaling.longrope import LongRoPE
from ...scaling.rope import Scaler
from ..checkpoints.checkpoint import from_hub, weight_files
from ..checkpoints.config import find_config
from ..checkpoints.gguf_file import GgufFile
from ..patches.patch_record import patched_with
from .hf_folder import KEPT, with_rope, write_copy, write_loaded
from .plain import check_kind, check_plain
from .scaled_config import Derived, check_written, is_accepted, scaler_to_write
from .serving_engines import TARGETS, Target, serve_command, serve_script

if TYPE_CHECKING:
    from ..model import Model

__all__ = ["Export", "export"]

_GGUF = ("llama.cpp", "ollama")


@dataclass(frozen=True, kw_only=True)
class Export:
    """What was written.

    Attributes:
        path: the folder, or the GGUF file.
        target: a member of `serving_engines.TARGETS`.
        scaler: what it holds; where the one asked for follows the length, as it is at `length`.
        length: tokens that it promises to carry.
        carrier: how the frequencies are said there, a few words.
        command: how to start the engine; empty for hf.
    """

    path: Path
    target: str
    scaler: Scaler
    length: int
    carrier: str
    command: str = ""


@dataclass(frozen=True, kw_only=True)
class _Source:
    """A model to be exported: its files, or itself in memory.

    Attributes:
        folder: where its files are; None for a model in memory.
        model, tokenizer: the model in memory, else None.
        config: its transformers config.
        configured: its rotary embeddings by layer type.
        scaler: under which it shall be.
    """

    folder: Path | None
    model: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase | None
    config: Any
    configured: Mapping[str | None, hf.ConfiguredRope]
    scaler: str | Scaler | None

    @property
    def content(self) -> dict[str, Any]:
        """What is in its config.json, or would be."""
        if self.folder is None:
            return dict(self.config.to_dict())
        return dict(json.loads((self.folder / "config.json").read_text(encoding="utf-8")))


def export(
    model: str | Path | Model | PreTrainedModel,
    out: str | Path,
    *,
    target: Target = "hf",
    rope: str | Scaler | None = None,
    length: int | str | None = None,
    dtype: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Export:
    """Write a model so that `target` runs it under a scaler, with no ropewalk installed.

        rw.export("smollm2-135m", "out", rope="ntk-mixed:4")                    # for stock transformers
        rw.export("model-q4_k_m.gguf", "long.gguf", rope="yarn:4", target="llama.cpp")

    Args:
        model: what `load` takes, what it gave, or a transformers model, patched or not.
        out: a new folder; for llama.cpp a new file.
        target: "hf" (transformers), "vllm", "sglang", "llama.cpp" or "ollama".
        rope: a spec or scaler; None is the one that a loaded or patched model is under.
        length: tokens that are to be served, such as 32768, "32k" or "4x"; None is the scaler's reach. A scaler that
            follows the length is held still at it.
        dtype: of a GGUF file's matrices: "f32", "bf16" (if None), "f16" or "q8_0". Other targets, and GGUF files that
            are there already, keep the weights as they are.
        tokenizer: of a transformers model.

    Raises:
        ConfigError: the scaler acts on more than the frequencies, follows the length and none is given, or does not
            reach it; unknown target or dtype.
        UnsupportedModel: a model that the target cannot hold, or that computes something else than its config and
            weights say: an adapter that is not merged, a parametrised weight, a hook, a replaced forward, a config
            that was edited after the model was built.
        AssetError: there is no such model, or something is at `out`, or it cannot be written.
    """
    if target not in TARGETS:
        raise ConfigError(f"unknown target {target!r}.{did_you_mean(target, TARGETS)}")
    check_kind(model)
    if tokenizer is not None and not isinstance(model, PreTrainedModel):
        raise ConfigError("tokenizer is for a transformers model; others have their own")
    if dtype is not None and target not in _GGUF:
        raise ConfigError(f"dtype {dtype!r} is for GGUF files; {target} keeps the weights as they are")
    out = Path(out)
    if isinstance(model, str | Path) and Path(model).suffix == ".gguf" and target in _GGUF:
        if dtype is not None:
            raise ConfigError(f"{model} keeps its weights as they are; leave out dtype {dtype!r}")
        return _rewrite(Path(model), out, target, rope, length)
    source = _source(model, rope, tokenizer)
    if target in _GGUF:
        return _write_gguf(source, out, target, length, dtype or "bf16")
    return _write_folder(source, out, target, length)


def _source(model: str | Path | Model | PreTrainedModel, rope: str | Scaler | None, tokenizer: Any) -> _Source:
    if isinstance(model, str | Path):
        source, config = find_config(str(model))
        configured = hf.read(config.get_text_config())
        folder = Path(source) if Path(source).is_dir() else from_hub(source, *KEPT)
        return _Source(folder=folder, model=None, tokenizer=None, config=config, configured=configured, scaler=rope)
    if isinstance(model, PreTrainedModel):
        inner, own = model, patched_with(model)
    else:
        inner, own, tokenizer = model.hf, model.rope, model.tokenizer
    check_plain(model)
    scaler = own if rope is None else rope
    configured = hf.read(inner.config.get_text_config())
    return _Source(
        folder=None, model=inner, tokenizer=tokenizer, config=inner.config, configured=configured, scaler=scaler
    )


def _write_folder(source: _Source, out: Path, target: str, length: int | str | None) -> Export:
    """A Hugging Face folder."""
    configured = source.configured
    if target != "hf" and None not in configured:
        raise UnsupportedModel(
            f"this model has frequencies of their own for {', '.join(map(str, configured))}; how {target} reads them "
            "has not been checked, so export it for hf"
        )
    if all(hf.is_local(kind) for kind in configured):
        raise UnsupportedModel(
            "every layer of this model that uses RoPE sees a sliding window only, so no distance grows with the "
            "context and there is nothing to scale"
        )
    derived = Derived.of(source.config, source.model)
    scalers: dict[str | None, Scaler] = {}
    lengths = []
    for kind, one in configured.items():
        if hf.is_local(kind):  # no distance grows there
            scalers[kind] = one.scaler
        else:
            scalers[kind], longest = scaler_to_write(source.scaler, one, length, target)
            lengths.append(longest)
    tokens = min(lengths)  # where all layers are within reach
    derives = derived is not None
    ropes = {kind: _written(one, scalers[kind], target, derives=derives) for kind, one in configured.items()}
    wanted = {kind: (one.rope, scalers[kind]) for kind, one in configured.items()}
    outside = hasattr(source.config.get_text_config(), "original_max_position_embeddings")
    if not is_accepted(with_rope(source.content, ropes, tokens, outside_length=outside), wanted):
        with contextlib.suppress(ConfigError):  # then the check of what was written says why
            ropes = {
                kind: _written(one, scalers[kind], target, derives=derives, as_longrope=True)
                for kind, one in configured.items()
            }
    shown = next(kind for kind in ropes if not hf.is_local(kind))  # the layers that see the whole text
    extra = {}
    if target != "hf":
        overrides = {"rope_parameters": ropes[None], "max_position_embeddings": tokens}
        extra["serve.sh"] = serve_script(target, str(scalers[shown]), tokens, overrides)

    def change(config: dict[str, Any]) -> dict[str, Any]:
        return with_rope(config, ropes, tokens, outside_length=outside)

    def check(folder: Path) -> None:
        check_written(folder, wanted)
        if derived is not None:
            derived.check(folder, {kind: (one, scalers[kind]) for kind, one in configured.items()})

    if source.folder is not None:
        write_copy(source.folder, out, change, extra, check)
    else:
        assert source.model is not None
        write_loaded(source.model, source.tokenizer, out, change, extra, check)
    return Export(
        path=out,
        target=target,
        scaler=scalers[shown],
        length=tokens,
        carrier=f"rope_type {ropes[shown]['rope_type']!r} in config.json",
        command=serve_command(target, out, tokens),
    )


def _written(
    rope: hf.ConfiguredRope, scaler: Scaler, target: str, *, derives: bool, as_longrope: bool = False
) -> dict[str, Any]:
    """The `rope_parameters` for `target`.

    Args:
        derives: the model derives numbers from them outside of its rotary modules.
        as_longrope: as LongRoPE factors in any case.
    """
    if target == "hf":
        return hf_write.write(rope.rope, scaler, head_dim=rope.head_dim, as_longrope=as_longrope)
    # A latent attention that ships with longrope is read as longrope, the others as yarn.
    yarn_only = derives and not isinstance(rope.scaler, LongRoPE)
    return hf_write.write_served(
        rope.rope, scaler, head_dim=rope.head_dim, yarn_only=yarn_only, as_longrope=as_longrope
    )


def _write_gguf(source: _Source, out: Path, target: str, length: int | str | None, dtype: str) -> Export:
    """A GGUF file from a checkpoint."""
    from .gguf_rewrite import place, write_gguf

    configured = source.configured
    if None not in configured:
        raise UnsupportedModel("a model with frequencies of their own for some layers cannot be written to GGUF")
    scaler, tokens = scaler_to_write(source.scaler, configured[None], length, target)
    rope = GgufRope.of(configured[None].rope, scaler)
    model = source.folder if source.model is None else (source.model, source.tokenizer)
    assert model is not None
    needed = 4 * sum(file.stat().st_size for file in weight_files(source.folder)) if source.folder else 0
    place(out, target, tokens, needed, lambda path: write_gguf(model, path, dtype, rope=rope, context_length=tokens))
    return _gguf_export(out, target, scaler, tokens, rope)


def _rewrite(file: Path, out: Path, target: str, asked: str | Scaler | None, length: int | str | None) -> Export:
    """A GGUF file from another one."""
    from .gguf_rewrite import place, rewrite_gguf

    opened = GgufFile(file)
    configured = opened.configured
    scaler, tokens = scaler_to_write(asked, configured, length, target)
    rope = GgufRope.of(configured.rope, scaler)
    place(out, target, tokens, file.stat().st_size, lambda path: rewrite_gguf(opened, path, rope, tokens))
    return _gguf_export(out, target, scaler, tokens, rope)


def _gguf_export(out: Path, target: str, scaler: Scaler, tokens: int, rope: GgufRope) -> Export:
    carrier = "rope.scaling." + ", ".join(rope.scaling) if rope.scaling else "rope.freq_base"
    if rope.divisors is not None:
        carrier = "rope_freqs.weight" + (" and rope.scaling.attn_factor" if "attn_factor" in rope.scaling else "")
    return Export(
        path=out,
        target=target,
        scaler=scaler,
        length=tokens,
        carrier=carrier,
        command=serve_command(target, out, tokens),
    )
