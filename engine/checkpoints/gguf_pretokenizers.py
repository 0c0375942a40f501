"""The pre-tokenizers of byte-level BPE, by their names in GGUF files (`tokenizer.ggml.pre`).

A pre-tokenizer splits a text before the merges. The names are those of llama.cpp (llama-vocab.cpp), and the regular
expressions those of the original tokenizers. On five texts, including the start token, the ids are those of llama.cpp,
with two exceptions where llama.cpp writes the expressions differently: `_CASED` and tekken before combining marks, and
tiny_aya for digits before Chinese.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["PRE_TOKENIZERS", "PreTokenizer"]


@dataclass(frozen=True, kw_only=True)
class PreTokenizer:
    """The meaning of a name.

    Attributes:
        steps: the pre-tokenizers of tokenizer.json, in order.
        ignore_merges: a piece that is a token becomes that token, whatever the merges give.
        add_bos: texts begin with the start token, unless `tokenizer.ggml.add_bos_token` is false.
    """

    steps: tuple[dict[str, Any], ...]
    ignore_merges: bool = False
    add_bos: bool = False


def _split(*expressions: str) -> tuple[dict[str, Any], ...]:
    """Pre-tokenizers that split a text into the matches and the text between them; then bytes become characters."""
    kind = {"type": "Split", "behavior": "Isolated", "invert": False}
    return (*({**kind, "pattern": {"Regex": expression}} for expression in expressions), _BYTES)


_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def _words(digits: str = r"\p{N}", *, short: str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|", marks: str = "") -> str:
    """The expression of Llama 3 and its variants.

    Args:
        digits: an expression for a piece of digits.
        short: an expression for English short forms.
        marks: an expression for combining marks that belong to a word.
    """
    letter = rf"[\p{{L}}{marks}]" if marks else r"\p{L}"
    return (
        rf"{short}[^\r\n\p{{L}}\p{{N}}]?{letter}+|{digits}| ?[^\s\p{{L}}{marks}\p{{N}}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )


def _cased(digits: str, short: str = "") -> str:
    """The expression of GPT-4o and tekken: a word is capitals followed by small letters."""
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    before = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{before}{upper}*{lower}+{short}|{before}{upper}+{lower}*{short}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


_CASED = _cased(r"\p{N}{1,3}", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?")
_WORDS, _THREE, _HAN = _words(), r"\p{N}{1,3}", r"[一-龥\x{3040}-ゟ゠-ヿ]+"
_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
_DEEPSEEK = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPACES = "".join(rf"|\s{{{2**n}}}(?!\S)" for n in range(9, 1, -1)) + r"|\s{1,2}(?!\S)|\s{1}"
_EXAONE_MOE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
_BAILING = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
_SEED = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_YOUTU = r"[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|[一-龥\x{3040}-ゟ゠-ヿ]+"

_GROUPS: tuple[tuple[str, PreTokenizer], ...] = (
    (
        "gpt-2 phi-2 jina-es jina-de jina-v2-es jina-v2-de gigachat a.x-4.0 mellum modern-bert mpt olmo jais trillion "
        "granite-docling exaone4",
        PreTokenizer(steps=({**_BYTES, "use_regex": True},)),
    ),
    (
        "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2",
        PreTokenizer(steps=({"type": "Digits", "individual_digits": True}, {**_BYTES, "use_regex": True})),
    ),
    (
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
        PreTokenizer(steps=_split(_words(_THREE)), ignore_merges=True, add_bos=True),
    ),
    ("dbrx smaug-bpe glm4 chatglm-bpe", PreTokenizer(steps=_split(_words(_THREE)))),
    (
        "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2",
        PreTokenizer(steps=_split(_WORDS)),
    ),
    ("qwen35", PreTokenizer(steps=_split(_words(marks=r"\p{M}")))),
    ("ufakzeka", PreTokenizer(steps=_split(_words(short="")))),
    ("laguna", PreTokenizer(steps=_split(r"[^\n]+|[\n]+", _WORDS))),
    ("minicpm5", PreTokenizer(steps=_split(_THREE, _words(r"\p{N}+")), ignore_merges=True)),
    ("jais-2", PreTokenizer(steps=_split(_words(_THREE).removesuffix(r"|\s+(?!\S)|\s+") + _SPACES))),
    ("tekken", PreTokenizer(steps=_split(_cased(r"\p{N}")), ignore_merges=True, add_bos=True)),
    ("gpt-4o llama4 kanana2 talkie minimax-m2", PreTokenizer(steps=_split(_CASED))),
    ("tiny_aya cohere2moe", PreTokenizer(steps=_split(r"\d{1,3}(?=(?:\d{3})*\b)", _CASED))),
    ("youtu", PreTokenizer(steps=_split(_YOUTU, _CASED.replace(_THREE, r"\p{N}")), ignore_merges=True)),
    ("deepseek-v3 hunyuan-dense joyai-llm hy_v4", PreTokenizer(steps=_split(_THREE, _HAN, _DEEPSEEK))),
    (
        "deepseek-coder",
        PreTokenizer(steps=_split(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-\x{D7FF}]+", r"\p{N}")),
    ),
    ("bailingmoe bailingmoe2 llada-moe", PreTokenizer(steps=_split(_BAILING))),
    ("seed-coder", PreTokenizer(steps=_split(_SEED))),
    ("exaone-moe", PreTokenizer(steps=_split(_EXAONE_MOE))),
    ("poro-chat bloom gpt3-finnish", PreTokenizer(steps=_split(_BLOOM))),
    ("viking", PreTokenizer(steps=_split(_BLOOM, r"\p{N}"))),
    ("falcon", PreTokenizer(steps=_split(r"[\p{P}\$\+<=>\^~\|`]+", _GPT2_WORDS, r"[0-9][0-9][0-9]"))),
    ("default", PreTokenizer(steps=_split(r"[\p{P}\$\+<=>\^~\|]+", _GPT2_WORDS, r"\p{N}+", r"[0-9][0-9][0-9]"))),
)

PRE_TOKENIZERS: dict[str, PreTokenizer] = {name: pre for names, pre in _GROUPS for name in names.split()}
"""Pre-tokenizers by name. Of several names for the same one, the first is written."""
