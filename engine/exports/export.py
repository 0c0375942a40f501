"""`export`: a model under a scaler, written so that other software computes the same frequencies."""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...errors import ConfigError, Setting, UnsupportedModel, did_you_mean, warn
from ...scaling import hf, hf_write
from ...scaling.gguf_rope import GgufRope
from ...scaling.named_scaler import as_trained
from ...scaling.rope import Scaler
from ...scaling.spec import parse
from ..checkpoints.checkpoint import read_tokenizer, read_weights, weight_files
from ..checkpoints.config import find_config, named_scaler
from ..checkpoints.gguf_conversion import file_behind
from ..checkpoints.gguf_file import GgufFile
from ..checkpoints.hub import hub_folder
from ..patches.patch import patched_with
from ..scaled_model import ScaledModel
from . import TARGETS, Target, llama_cpp_ollama, vllm_sglang
from .gguf_write import rewrite_gguf, write_gguf
from .hf_folder import COPIED_FILES, has_tokenizer, with_rope, write_copy, write_loaded
from .llama_cpp_ollama import GGUF_TARGETS, write_for
from .named_folder import NamedExport, needs_name
from .scaled_config import Derived, check_written, is_accepted, scaler_to_write
from .unmodified import check_type, check_unmodified

__all__ = ["Export", "export"]


@dataclass(frozen=True, kw_only=True)
class Export:
    """What was written.

    Attributes:
        path: the folder, or the GGUF file.
        target: a member of `exports.TARGETS`.
        scaler: the scaler in the files. A scaler that depends on the length is fixed to `length`.
        length: the context length that the files state, in tokens.
        carrier: how the files express the frequencies, in a few words.
        command: the command that starts the engine; empty for transformers alone.
    """

    path: Path
    target: str
    scaler: Scaler
    length: int
    carrier: str
    command: str = ""


@dataclass(frozen=True, kw_only=True)
class _Source:
    """A model to be exported: its files, or the model in memory.

    Attributes:
        folder: the folder of its files; None for a model in memory.
        model, tokenizer: the model in memory, else None.
        config: its transformers config.
        configured: its rotary embeddings by layer type.
        scaler: the scaler to be written.
    """

    folder: Path | None
    model: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase | None
    config: Any
    configured: Mapping[str | None, hf.ConfiguredRope]
    scaler: str | Scaler | None

    @property
    def content(self) -> dict[str, Any]:
        """The content of its config.json, from before it named a scaler."""
        if self.folder is None:
            return dict(self.config.to_dict())
        return as_trained(json.loads((self.folder / "config.json").read_text(encoding="utf-8")))


def export(
    model: str | Path | ScaledModel | PreTrainedModel,
    out: str | Path,
    *,
    target: Target = "hf",
    rope: str | Scaler | None = None,
    length: int | str | None = None,
    dtype: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Export:
    """Write a model so that `target` runs it under a scaler.

    A frequency method needs no ropewalk there. Position maps and temperatures are for ropewalk itself, and for vLLM
    and the server of transformers with ropewalk installed beside them.

        rw.export("smollm2-135m", "out", rope="ntk-mixed:4")                    # for stock transformers
        rw.export("model-q4_k_m.gguf", "long.gguf", rope="yarn:4", target="llama.cpp")
        rw.export("./my-model", "served", rope="self-extend:8,window=0.5x|logn", target="vllm")

    Args:
        model: a name that `load` takes, a model that `load` returned, or a transformers model, patched or not.
        out: a new folder; for llama.cpp a new file.
        target: "hf" (transformers), "vllm", "sglang", "llama.cpp" or "ollama".
        rope: a spec or scaler; None is the scaler of a loaded or patched model, or the one that a folder names.
        length: tokens to be served, such as 32768, "32k" or "4x"; None is the scaler's reach. A scaler that depends
            on the length is fixed to it.
        dtype: of the matrices of a new GGUF file: "f32", "bf16" (if None), "f16" or "q8_0". Other targets, and GGUF
            files that exist already, keep the weights as they are.
        tokenizer: the tokenizer of a transformers model. Servers need it; without it a warning says so.

    Raises:
        ConfigError: the scaler acts on more than the frequencies and the target is not hf or vllm, it does not reach
            `length`, or it needs a length and none is given; the target or dtype is unknown; `out` is the name of a
            GGUF file, and the target reads a folder.
        UnsupportedModel: the target cannot hold the model, or the model computes something else than its config and
            weights say: an adapter that is not merged, a parametrized weight, a hook, a replaced forward, a config
            that was edited after the model was built.
        AssetError: the model does not exist, `out` exists already, or it cannot be written.
    """
    if target not in TARGETS:
        raise ConfigError(f"unknown target {target!r}.{did_you_mean(target, TARGETS)}")
    out = Path(out)
    if target != "llama.cpp" and out.suffix == ".gguf":
        raise ConfigError(
            f"{out} is the name of a GGUF file, and ",
            Setting("target", repr(target), "given"),
            " writes a folder; take ",
            Setting("target", "'llama.cpp'", "given"),
            ", or a name that does not end in .gguf",
        )
    check_type(model)
    if tokenizer is not None and not isinstance(model, PreTrainedModel):
        raise ConfigError("tokenizer is an option for a transformers model; this model has its own tokenizer")
    if dtype is not None and target not in GGUF_TARGETS:
        raise ConfigError(
            Setting("dtype", repr(dtype), "given"), f" is for GGUF files; {target} keeps the weights as they are"
        )
    if isinstance(model, str | Path) and Path(model).suffix == ".gguf" and target in GGUF_TARGETS:
        if dtype is not None:
            raise ConfigError(
                f"{model} keeps its weights as they are; leave out ", Setting("dtype", repr(dtype), "given")
            )
        return _rewrite_gguf(Path(model), out, target, rope, length)
    source = _source(model, rope, tokenizer)
    if target in GGUF_TARGETS:
        return _write_gguf(source, out, target, length, dtype or "bf16")
    written = _write_folder(source, out, target, length)
    if target != "hf" and not has_tokenizer(out):
        warn(
            f"{out} has no tokenizer, which {target} needs; export with tokenizer=, or put the files of the tokenizer "
            "into the folder"
        )
    return written


def _source(model: str | Path | ScaledModel | PreTrainedModel, rope: str | Scaler | None, tokenizer: Any) -> _Source:
    if isinstance(model, str | Path):
        source, config = find_config(str(model))
        configured = hf.read(config.get_text_config())
        folder = Path(source) if Path(source).is_dir() else hub_folder(source, *COPIED_FILES)
        if rope is None and (named := named_scaler(str(folder))) is not None:
            rope = named.scaler
        if file_behind(folder) is not None:
            hf_model, tokenizer = read_weights(source, config, dtype="auto"), read_tokenizer(source)
            return _Source(
                folder=None, model=hf_model, tokenizer=tokenizer, config=config, configured=configured, scaler=rope
            )
        return _Source(folder=folder, model=None, tokenizer=None, config=config, configured=configured, scaler=rope)
    if isinstance(model, PreTrainedModel):
        current = patched_with(model)
    else:
        current, tokenizer = model.rope, model.tokenizer
    inner = check_unmodified(model)
    configured = hf.read(inner.config.get_text_config())
    scaler = current if rope is None else rope
    return _Source(
        folder=None, model=inner, tokenizer=tokenizer, config=inner.config, configured=configured, scaler=scaler
    )


def _write_folder(source: _Source, out: Path, target: str, length: int | str | None) -> Export:
    """Write a Hugging Face folder."""
    configured = source.configured
    if target in ("hf", "vllm") and needs_name(parse(source.scaler, next(iter(configured.values())).max_length)):
        return _write_named(source, out, target, length)
    _check_layer_types(configured, target)
    _check_temperature(configured, target)
    scalers, tokens = _static_scalers(source, target, length)
    wanted = {kind: (rope, scalers[kind]) for kind, rope in configured.items()}
    derived = Derived.of(source.config, source.model)
    outside = hasattr(source.config.get_text_config(), "original_max_position_embeddings")

    def parameters(*, as_longrope: bool = False) -> dict[str | None, dict[str, Any]]:
        options = {"latent_attention": derived is not None, "as_longrope": as_longrope}
        return {kind: _rope_parameters(rope, scalers[kind], target, **options) for kind, rope in configured.items()}

    written = parameters()
    if not is_accepted(with_rope(source.content, written, tokens, outside_length=outside), wanted):
        with contextlib.suppress(ConfigError):  # the check of the written folder gives the reason
            written = parameters(as_longrope=True)
    shown = next(kind for kind in written if not hf.is_local(kind))
    extra = {}
    if target != "hf":
        overrides = {"rope_parameters": written[None], "max_position_embeddings": tokens}
        extra["serve.sh"] = vllm_sglang.serve_script(target, str(scalers[shown]), tokens, overrides)

    def change(config: dict[str, Any]) -> dict[str, Any]:
        return with_rope(as_trained(config), written, tokens, outside_length=outside)

    def check(folder: Path) -> None:
        check_written(folder, wanted)
        if derived is not None:
            derived.check(folder, wanted)

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
        carrier=f"rope_type {written[shown]['rope_type']!r} in config.json",
        command="" if target == "hf" else vllm_sglang.serve_command(target, out, tokens),
    )


def _write_named(source: _Source, out: Path, target: str, length: int | str | None) -> Export:
    """Write a Hugging Face folder whose config names the scaler, which is the same for all targets that read it."""
    for_vllm = target == "vllm"
    named = NamedExport.of(source.scaler, source.configured, length, source.config if for_vllm else None)
    extra, carrier = {}, "its name in config.json, which ropewalk reads"
    command = f"ropewalk transformers-serve {shlex.quote(str(out))} --continuous-batching"
    if for_vllm:
        overrides = named.overrides(source.content)
        extra["serve.sh"] = vllm_sglang.serve_script(
            "vllm", str(named.named.scaler), named.tokens, overrides, plugin=True
        )
        carrier = "its name in config.json, which ropewalk's plug-in for vLLM reads"
        command = vllm_sglang.serve_command("vllm", out, named.tokens)
    if source.folder is not None:
        write_copy(source.folder, out, named.change, extra, named.check)
    else:
        assert source.model is not None
        write_loaded(source.model, source.tokenizer, out, named.change, extra, named.check)
    return Export(
        path=out,
        target=target,
        scaler=named.named.scaler,
        length=named.tokens,
        carrier=carrier,
        command=command,
    )


def _check_layer_types(configured: Mapping[str | None, hf.ConfiguredRope], target: str) -> None:
    if target != "hf" and None not in configured:
        raise UnsupportedModel(
            f"this model has different frequencies for {', '.join(map(str, configured))}; how {target} reads them "
            "was not checked, so take ",
            Setting("target", "hf"),
        )
    if all(hf.is_local(layer_type) for layer_type in configured):
        raise UnsupportedModel(
            "every layer of this model that uses RoPE sees a sliding window only, so no distance grows with the "
            "context and there is nothing to scale"
        )


def _check_temperature(configured: Mapping[str | None, hf.ConfiguredRope], target: str) -> None:
    own = next((rope.temperature for rope in configured.values() if rope.temperature is not None), None)
    if own is not None and target != "hf":
        raise UnsupportedModel(
            f"this model has a temperature of its own, {own}; how {target} reads it was not checked, so take ",
            Setting("target", "hf"),
        )


def _static_scalers(source: _Source, target: str, length: int | str | None) -> tuple[dict[str | None, Scaler], int]:
    """The scaler to be written for each layer type, and the tokens that all layers reach."""
    scalers: dict[str | None, Scaler] = {}
    lengths = []
    for layer_type, rope in source.configured.items():
        if hf.is_local(layer_type):  # its distances do not grow with the context
            scalers[layer_type] = rope.scaler
        else:
            scalers[layer_type], reach = scaler_to_write(source.scaler, rope, length, target)
            lengths.append(reach)
    return scalers, min(lengths)


def _rope_parameters(
    rope: hf.ConfiguredRope, scaler: Scaler, target: str, *, latent_attention: bool, as_longrope: bool = False
) -> dict[str, Any]:
    if target == "hf":
        return hf_write.write(
            rope.rope, scaler, head_dim=rope.head_dim, as_longrope=as_longrope, temperature=rope.temperature
        )
    return vllm_sglang.rope_parameters(rope, scaler, latent_attention=latent_attention, as_longrope=as_longrope)


def _write_gguf(source: _Source, out: Path, target: str, length: int | str | None, dtype: str) -> Export:
    """Write a checkpoint as a GGUF file."""
    configured = source.configured
    _check_temperature(configured, target)
    if None not in configured:
        raise UnsupportedModel(
            f"this model has different frequencies for {', '.join(map(str, configured))}; a GGUF file holds one set"
        )
    scaler, tokens = scaler_to_write(source.scaler, configured[None], length, target)
    rope = GgufRope.of(configured[None].rope, scaler)
    model = source.folder if source.model is None else (source.model, source.tokenizer)
    assert model is not None
    needed = 4 * sum(file.stat().st_size for file in weight_files(source.folder)) if source.folder else 0

    def write(path: Path) -> None:
        write_gguf(model, path, dtype, rope=rope, context_length=tokens)

    write_for(target, out, tokens, needed, write)
    return _gguf_export(out, target, scaler, tokens, rope)


def _rewrite_gguf(file: Path, out: Path, target: str, asked: str | Scaler | None, length: int | str | None) -> Export:
    """Write a GGUF file from another one."""
    opened = GgufFile(file)
    configured = opened.configured
    scaler, tokens = scaler_to_write(asked, configured, length, target)
    rope = GgufRope.of(configured.rope, scaler)
    write_for(target, out, tokens, file.stat().st_size, lambda path: rewrite_gguf(opened, path, rope, tokens))
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
        command=llama_cpp_ollama.serve_command(target, out, tokens),
    )
