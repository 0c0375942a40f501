"""The RoPE that vLLM, SGLang, llama.cpp and other engines compute from the same Hugging Face config or GGUF file.

A reading has a scaler, so the computation of an engine can be measured here. The rules are from the engines'
sources in November 2026; docs/export.md lists the readings that have been compared with a running engine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from . import hf
from .base import Base
from .engine_reading import SERVED_LENGTHS, EngineReading, EngineRope, same_frequencies
from .gguf_rope import GgufRope
from .hf_entry import MODEL_CODE_KEYS
from .longrope import LongRoPE
from .named_scaler import NamedScaler, names_scaler
from .rope import Scaler
from .yarn import YaRN, yarn_temperature

__all__ = ["ENGINES", "read_all", "read_gguf"]

_BY_LAYER = ("transformers", "vLLM")
"""Engines whose sources have been read for configs with frequencies for each type of layer."""

_LEFT_OUT = ("mrope_section", "xdrope_section", "llama_4_scaling_beta")
"""Keys that act outside the frequencies, which a table of frequencies leaves out."""

_LENGTH_OPTIONS = {"vLLM": "--max-model-len", "SGLang": "--context-length", "llama.cpp": "--ctx-size"}


def read_all(config: Mapping[str, Any]) -> list[EngineReading]:
    """Every engine's reading of the content of a config.json, with transformers first.

    If the config names a scaler, vLLM is first.

    If each type of layer has its own frequencies, the layers that see the whole text are read.

    Raises:
        UnsupportedModel: no RoPE.
        ConfigError: transformers does not accept the config.
    """
    if names_scaler(config):
        return _named_readings(NamedScaler.read(config), config)
    text_config = hf.text_config(config)
    notes = [_remove_model_code_keys(text_config), _dual_chunk_note(text_config)]
    configured = hf.read(text_config)
    kind = next((kind for kind in configured if not hf.is_local(kind)), next(iter(configured)))
    text, length = hf.text_content(config), "original_max_position_embeddings"
    if kind is None:
        parameters = hf.merged_parameters(text_config)
        if not any(length in (part or {}) for part in (text, text.get("rope_scaling"), text.get("rope_parameters"))):
            parameters.pop(length, None)  # transformers adds it; the other engines do not see it
    else:
        parameters = {key: value for key, value in text_config.rope_parameters[kind].items() if value is not None}
        notes.append(_layers_note(kind, configured))
    engine_rope = EngineRope(
        config=text_config,
        parameters=parameters,
        configured=configured[kind],
        has_old_keys=text.get("rope_scaling") is not None or text.get("rope_theta") is not None,
    )
    readings = [
        read(engine_rope) if kind is None or name in _BY_LAYER else _not_read(name, engine_rope)
        for name, read in ENGINES.items()
    ]
    return [replace(readings[0], notes=(*readings[0].notes, *filter(None, notes))), *readings[1:]]


def _named_readings(named: NamedScaler, config: Mapping[str, Any]) -> list[EngineReading]:
    """The readings of a config that names a scaler, with vLLM first."""
    rope, length = named.configured.rope, hf.tokens(hf.text_content(config), "max_position_embeddings")
    notes = ["computes it with ropewalk installed beside it, and refuses the config without (docs/export.md)"]
    if named.length is not None:
        notes.append(f"holds it at a length of {named.length} for all texts")
    refused = EngineReading(
        engine="transformers",
        rope=rope,
        scaler=None,
        max_length=None,
        notes=("does not know the rope type; `ropewalk transformers-serve` starts its server with the scaler",),
    )
    others = [
        replace(refused, engine=name, is_read=False, notes=("has not been read for a named scaler",))
        for name in ENGINES
        if name not in ("vLLM", "transformers")
    ]
    served = replace(refused, engine="vLLM", scaler=named.effective, max_length=length, notes=tuple(notes))
    return [served, refused, *others]


def _remove_model_code_keys(config: Any) -> str:
    """Remove the keys that the model's own code uses from a config object. The result is a note that names them."""
    parameters = getattr(config, "rope_parameters", None) or {}
    keys = [key for key in _LEFT_OUT if parameters.get(key) is not None]
    if not keys:
        return ""
    config.rope_parameters = {key: value for key, value in parameters.items() if key not in keys}
    removed = ", ".join(f"{MODEL_CODE_KEYS[key]} ({key})" for key in keys)
    return f"also has {removed}, which the table leaves out"


def _dual_chunk_note(config: Any) -> str:
    if getattr(config, "dual_chunk_attention_config", None) is None:
        return ""
    return "does not use dual_chunk_attention_config; vLLM uses it for long texts, which the table leaves out"


def _layers_note(kind: str, configured: Mapping[str | None, hf.ConfiguredRope]) -> str:
    """A note on the other types of layers, as transformers computes them."""
    others = [
        f"; those of type {other} have base {rope.rope.base:g}" + (f" and {rope.scaler}" if rope.scaler.parts else "")
        for other, rope in configured.items()
        if other != kind
    ]
    return f"has frequencies for each type of layer; the table is about {kind}{''.join(others)}"


def _not_read(engine: str, raw: EngineRope) -> EngineReading:
    note = "has not been read for models with frequencies for each type of layer"
    return EngineReading(engine=engine, rope=raw.rope, scaler=None, max_length=None, notes=(note,), is_read=False)


def _reading(engine: str, raw: EngineRope, scaler: Scaler | None, *notes: str, **rope: Any) -> EngineReading:
    """A reading, with the length that the engine serves.

    Args:
        notes: sentences for the user; empty ones are left out.
        rope: fields of the geometry that differ from those of transformers.
    """
    limit = SERVED_LENGTHS.get(engine)
    served = None if limit is None else limit(raw)
    return EngineReading(
        engine=engine,
        rope=replace(raw.rope, **rope),
        scaler=scaler,
        max_length=served,
        notes=tuple(filter(None, (*notes, _length_note(engine, served, raw)))),
    )


def _length_note(engine: str, served: int | None, raw: EngineRope) -> str:
    """A note if a server takes more or fewer tokens than the config promises."""
    option = _LENGTH_OPTIONS.get(engine)
    if option is None or served is None or served == raw.max_length:
        return ""
    more = "more" if served > raw.max_length else "fewer"
    return f"serves {more} tokens than the {raw.max_length} of max_position_embeddings unless {option} is given"


def _transformers(raw: EngineRope) -> EngineReading:
    follows = "follows the longest text of each batch" if raw.scaler.depends_on_length else ""
    return _reading("transformers", raw, raw.scaler, follows)


def _vllm(raw: EngineRope) -> EngineReading:
    name = "vLLM"
    old, new = raw.get("type"), raw.get("rope_type")
    if None not in (old, new) and old != new and (old, new) not in (("su", "longrope"), ("mrope", "default")):
        note = f"refuses a config whose type ({old}) and rope_type ({new}) differ; remove type"
        return EngineReading(engine=name, rope=raw.rope, scaler=None, max_length=None, notes=(note,))
    match raw.kind:
        case "dynamic":
            return _reading(
                name,
                raw,
                Scaler(),
                "has no dynamic scaling that follows the text: plain frequencies, and before May 2026 a larger base",
            )
        case "yarn":
            ignored = [key for key in ("attention_factor", "mscale") if raw.get(key) is not None]
            note = f"in releases before autumn 2026 ignores {' and '.join(ignored)}" if ignored else ""
            return _reading(name, raw, raw.scaler, note)
        case "longrope":
            return _fixed_longrope(name, raw, "if the server's max_model_len is above the trained length")
        case "proportional":
            return _proportional(name, raw)
        case "linear":
            return _reading(name, raw, *_linear(raw))
    return _reading(name, raw, raw.scaler)


def _sglang(raw: EngineRope) -> EngineReading:
    name = "SGLang"
    match raw.kind:
        case "dynamic":
            s, d = float(raw.parameters["factor"]), raw.rope.dim
            base = raw.rope.base * (s * s - s + 1) ** (d / (d - 2))
            return _reading(
                name,
                raw,
                Base(base=base),
                "has no dynamic scaling that follows the text: one larger base at every length",
            )
        case "yarn":
            note = "ignores attention_factor; attn_factor multiplies its own" if raw.get("attention_factor") else ""
            return _reading(name, raw, _sglang_yarn(raw), note)
        case "longrope":
            return _fixed_longrope(name, raw, "for a batch in which any text is longer than the trained length")
        case "proportional":
            return _proportional(name, raw)
        case "linear":
            return _reading(name, raw, *_linear(raw))
    return _reading(name, raw, raw.scaler)


def _sglang_yarn(raw: EngineRope) -> YaRN:
    yarn = _yarn(raw)
    mscale, all_dim = raw.get("mscale"), raw.get("mscale_all_dim")
    m = rule = yarn_temperature(yarn.factor)
    if mscale is not None and all_dim is not None:
        m = yarn_temperature(yarn.factor, mscale) / yarn_temperature(yarn.factor, all_dim)
    return replace(yarn, attention_factor=None if m == rule else m, mscale=None, mscale_all_dim=None)


def _llama_cpp(raw: EngineRope) -> EngineReading:
    name = "llama.cpp"
    by = "in its converter; `ropewalk export --target llama.cpp` writes it exactly"
    match raw.kind:
        case "yarn":
            yarn = YaRN(factor=_yarn(raw).factor)
            lost = [
                key
                for key, plain in (("attention_factor", None), ("mscale", None), ("truncate", True))
                if raw.get(key) not in (None, plain)
            ]
            lost += [key for key, plain in (("beta_fast", 32), ("beta_slow", 1)) if raw.get(key) not in (None, plain)]
            return _reading(name, raw, yarn, f"loses {', '.join(lost)} {by}" if lost else "")
        case "longrope":
            return _reading(name, raw, Scaler(), f"drops the scaling of a Llama model {by}")
        case "dynamic" | "proportional":
            return _reading(name, raw, Scaler(), f"drops the {raw.kind} scaling {by}")
        case "llama3" if raw.rope.trained_length != 8192:
            return _reading(
                name,
                raw,
                raw.scaler,
                "takes 8192 as the trained length in most versions of its converter",
                trained_length=8192,
            )
    return _reading(name, raw, raw.scaler)


def _exllama(raw: EngineRope) -> EngineReading:
    name = "ExLlamaV3"
    match raw.kind:
        case "dynamic":
            return _reading(name, raw, None, "has no dynamic scaling")
        case "yarn":
            factor = raw.stretch if raw.get("original_max_position_embeddings") else _yarn(raw).factor
            yarn, given = _yarn(raw), raw.get("attention_factor")
            scaler = replace(yarn, factor=max(factor, 1.0), attention_factor=given, mscale=None, mscale_all_dim=None)
            return _reading(
                name,
                raw,
                scaler,
                ""
                if math.isclose(factor, yarn.factor)
                else "takes max_position_embeddings over the trained length as the factor, and ignores the given one",
                "ignores mscale" if raw.get("mscale") is not None and given is None else "",
            )
        case "longrope":
            return _fixed_longrope(
                name, raw, "if max_position_embeddings is above the trained length", reads_mscale=False
            )
    return _reading(name, raw, raw.scaler)


def _mlx(raw: EngineRope) -> EngineReading:
    name = "mlx-lm"
    if not raw.has_old_keys:
        return _reading(
            name,
            raw,
            Scaler(),
            "reads only rope_theta and rope_scaling for a Llama, which this file does not have: base 10000, no scaling",
            base=10_000.0,
        )
    match raw.kind:
        case "dynamic":
            return _reading(name, raw, None, "has no dynamic scaling")
        case "yarn":
            trained = raw.get("original_max_position_embeddings") or 4096
            yarn = _yarn(raw)
            scaler = replace(yarn, attention_factor=None, truncate=True)
            ignored = [key for key in ("attention_factor", "truncate") if getattr(scaler, key) != getattr(yarn, key)]
            note = f"ignores {' and '.join(ignored)}" if ignored else ""
            return _reading(name, raw, scaler, note, trained_length=trained)
        case "longrope":
            return _fixed_longrope(name, raw, "at every length", reads_mscale=False, always_long=True)
    return _reading(name, raw, raw.scaler)


def _fixed_longrope(
    name: str, raw: EngineRope, when: str, *, reads_mscale: bool = True, always_long: bool = False
) -> EngineReading:
    """One list of factors for all texts, with m from the rule or from `long_mscale`.

    Args:
        when: the condition for the long list, in words.
        always_long: take the long list even if the config promises no more than the trained length.
    """
    longrope = raw.scaler
    assert isinstance(longrope, LongRoPE)
    factors = longrope.long if raw.stretch > 1 or always_long else longrope.short
    m = math.sqrt(1 + math.log(raw.stretch) / math.log(raw.rope.trained_length)) if raw.stretch > 1 else 1.0
    if reads_mscale and raw.get("long_mscale"):
        m = float(raw.parameters["long_mscale"])
    scaler = replace(longrope, short=factors, long=factors, attention_factor=m)
    given = longrope.temperature(raw.rope)
    return _reading(
        name,
        raw,
        scaler,
        f"takes the long factors {when}" if longrope.short != longrope.long else "",
        ""
        if math.isclose(m, given, rel_tol=1e-6)
        else f"ignores attention_factor and factor: m {m:.4g}, not {given:.4g}",
    )


def _yarn(raw: EngineRope) -> YaRN:
    assert isinstance(raw.scaler, YaRN)
    return raw.scaler


def _proportional(name: str, raw: EngineRope) -> EngineReading:
    """Frequencies without the factor of the proportional type."""
    ignored = "ignores the factor of proportional" if raw.scaler != Scaler() else ""
    return _reading(name, raw, Scaler(), "older releases refuse proportional", ignored)


def _linear(raw: EngineRope) -> tuple[Scaler | None, str]:
    """The scaler and a note."""
    if isinstance(raw.get("factor"), int):
        return None, "fails if the factor is a whole number; write it with a decimal point"
    return raw.scaler, ""


ENGINES: dict[str, Callable[[EngineRope], EngineReading]] = {
    "transformers": _transformers,
    "vLLM": _vllm,
    "SGLang": _sglang,
    "llama.cpp": _llama_cpp,
    "ExLlamaV3": _exllama,
    "mlx-lm": _mlx,
}
"""The function that reads a config, by the engine's name."""


def read_gguf(file: GgufRope, context_length: int) -> list[EngineReading]:
    """The readings of a GGUF file, with llama.cpp first.

    Args:
        context_length: context length of the file, which the engines serve.
    """
    others = {
        "Ollama's own engine": (
            GgufRope(
                dim=file.dim,
                base=file.base,
                scaling={"type": "linear", "factor": file.factor} if file.factor != 1 else {},
                divisors=file.divisors,
            ),
            "if OLLAMA_NEW_ENGINE is set; reads only base, factor and divisors",
        ),
        "transformers": (GgufRope(dim=file.dim, base=file.base), "its GGUF reader takes only the base"),
    }
    readings = [_gguf_reading("llama.cpp", file, context_length)]
    for engine, (rope, note) in others.items():
        reading = _gguf_reading(engine, rope, context_length)
        is_same = same_frequencies(reading, readings[0], context_length)
        readings.append(reading if is_same else replace(reading, notes=(note,)))
    return readings


def _gguf_reading(engine: str, rope: GgufRope, context_length: int) -> EngineReading:
    configured = rope.configured(context_length)
    return EngineReading(engine=engine, rope=configured.rope, scaler=configured.scaler, max_length=context_length)
