"""The reader of GGUF tokenizers: a transformers tokenizer that splits and decodes texts as llama.cpp does."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

from ...errors import RopewalkError, UnsupportedModel, did_you_mean, first_line
from .gguf_file import GgufFile, read_by_transformers
from .gguf_pretokenizers import PRE_TOKENIZERS

__all__ = ["END_NAMES", "end_ids", "read_gguf_tokenizer"]

_BUILT = ("gpt2", "llama")
"""Values of `tokenizer.ggml.model` for which the tokenizer is built here. transformers builds the others."""

_GEMMA = ("gemma", "gemma2", "gemma3")
"""Architectures whose merges do not follow their SentencePiece scores. transformers knows their merges."""

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # values of `tokenizer.ggml.token_type`

_ENDS = (
    "<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> </s> <|eom_id|> "
    "<EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos> <turn|> <|tool_response> <｜end▁of▁sentence｜> "
    "[e~[ <|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD] <|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame> "
    "<|file_sep|>"
)
END_NAMES = frozenset(_ENDS.split())
"""Names of control tokens that end a text in llama.cpp."""

_END_KEYS = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
_SPM_IDS = {"bos": 1, "eos": 2, "unknown": 0}  # defaults of a SentencePiece vocabulary
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


def read_gguf_tokenizer(file: GgufFile) -> Any:
    """The transformers tokenizer of a file, without its weights.

    Raises:
        UnsupportedModel: the pre-tokenizer is unknown, fields are missing or contradict each other, or transformers
            cannot read the file.
    """
    if file.required("tokenizer.ggml.model") in _BUILT and file.arch not in _GEMMA:
        return _build_tokenizer(file)
    from transformers import AutoTokenizer

    with read_by_transformers(file) as source:
        return AutoTokenizer.from_pretrained(**source)


def _build_tokenizer(file: GgufFile) -> Any:
    """The tokenizer of a byte-level BPE ("gpt2") or a SentencePiece BPE ("llama")."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    with _reading(file):
        vocabulary = _Vocabulary(file)
        content = vocabulary.byte_level() if vocabulary.model == "gpt2" else vocabulary.sentencepiece()
        backend = Tokenizer.from_str(json.dumps(content))
        hf_names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
        special = {f"{hf_name}_token": vocabulary.token(name) for name, hf_name in hf_names.items()}
        template = file.field("tokenizer.chat_template")
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **special)
    if len(tokenizer) > len(vocabulary.tokens):
        raise UnsupportedModel(
            f"{file.path}: the fields of its tokenizer give {len(tokenizer)} tokens, but its list has "
            f"{len(vocabulary.tokens)}; load the original checkpoint"
        )
    return tokenizer


def end_ids(file: GgufFile) -> list[int]:
    """Ids of the tokens that end a text: the end token of the file first, then other fields, then the tokens that
    llama.cpp knows by name.

    Raises:
        UnsupportedModel: the fields are damaged.
    """
    with _reading(file):
        vocabulary = _Vocabulary(file)
        ids = [vocabulary.id(kind) for kind in _END_KEYS]
        by_name = [i for i in vocabulary.of_type(CONTROL) if vocabulary.tokens[i] in END_NAMES]
    names = {vocabulary.tokens[i] for i in by_name}
    excluded = set()  # names that do not end a text if certain others exist
    if names >= {"<|return|>", "<|call|>"} or names >= {"<|calls|>", "<|flush|>"}:
        excluded.add("<|end|>")
    if "<|tool_response>" in names:
        excluded.add("</s>")
    ids += [i for i in by_name if vocabulary.tokens[i] not in excluded]
    return list(dict.fromkeys(i for i in ids if i is not None))


@contextlib.contextmanager
def _reading(file: GgufFile) -> Iterator[None]:
    """Raise an error that names the file, whatever its fields hold."""
    try:
        yield
    except RopewalkError:
        raise
    except Exception as error:  # a damaged field has any type, and tokenizers has no error class
        raise UnsupportedModel(
            f"{file.path}: the fields of its tokenizer do not fit together ({first_line(error)}); get the file again"
        ) from error


class _Vocabulary:
    """The fields `tokenizer.ggml.*` of a file."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self.model = file.required("tokenizer.ggml.model")
        tokens = file.required("tokenizer.ggml.tokens")
        self.tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
        self._types = file.field("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
        if len(self._types) < len(tokens):
            raise self.error(f"{len(self._types)} token types for {len(tokens)} tokens")
        if len(set(self.tokens)) < len(tokens):
            repeated = next(token for i, token in enumerate(self.tokens) if self.tokens.index(token) < i)
            raise self.error(f"the token {repeated!r} twice")

    def error(self, what: str) -> UnsupportedModel:
        return UnsupportedModel(
            f"{self.file.path}: its tokenizer has {what}; get the file again, or convert the original again"
        )

    def of_type(self, *types: int) -> list[int]:
        return [i for i, kind in enumerate(self._types[: len(self.tokens)]) if kind in types]

    def id(self, kind: str) -> int | None:
        """The id of a special token, or None."""
        token_id: int | None = self.file.field(f"tokenizer.ggml.{kind}_token_id")
        if token_id is None and self.model == "llama" and len(self.tokens) > 2:
            token_id = _SPM_IDS.get(kind)
        if token_id is not None and not 0 <= token_id < len(self.tokens):
            raise self.error(f"{kind}_token_id {token_id}, and {len(self.tokens)} tokens")
        return token_id

    def token(self, kind: str) -> str | None:
        """The text of a special token, or None."""
        token_id = self.id(kind)
        return None if token_id is None else self.tokens[token_id]

    def byte_level(self) -> dict[str, Any]:
        """The content of a tokenizer.json for a byte-level BPE."""
        name = self.file.field("tokenizer.ggml.pre")
        if name not in PRE_TOKENIZERS:
            stated = "no tokenizer.ggml.pre" if name is None else f"tokenizer.ggml.pre {name!r}"
            raise UnsupportedModel(
                f"{self.file.path} has {stated}, so the pre-tokenizer is unknown; load the original checkpoint, or "
                f"convert it again with a newer llama.cpp.{did_you_mean(name or '', PRE_TOKENIZERS)}"
            )
        pre = PRE_TOKENIZERS[name]
        bpe = self._bpe(self._listed_merges(), ignore_merges=pre.ignore_merges)
        decoder = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
        steps = {"type": "Sequence", "pretokenizers": list(pre.steps)}
        return self._content(bpe, None, steps, decoder, add_bos=pre.add_bos)

    def sentencepiece(self) -> dict[str, Any]:
        """The content of a tokenizer.json for a SentencePiece BPE.

        The tokenizer adds a space before every part of a text, also after a special token, unless add_space_prefix is
        false.
        """
        prefix = self.file.field("tokenizer.ggml.add_space_prefix") is not False
        spaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
        normalizers = [{"type": "Prepend", "prepend": _SPACE}] * prefix + [spaces]
        decoders = [
            {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            *[{"type": "Strip", "content": " ", "start": 1, "stop": 0}] * prefix,
        ]
        bpe = self._bpe(self._merges_by_score(), byte_fallback=True, fuse_unk=True, unk_token=self.token("unknown"))
        normalizer = {"type": "Sequence", "normalizers": normalizers}
        return self._content(bpe, normalizer, None, {"type": "Sequence", "decoders": decoders}, add_bos=True)

    def _bpe(self, merges: list[list[str]], **settings: Any) -> dict[str, Any]:
        vocab = {token: i for i, token in enumerate(self.tokens)}
        return {"type": "BPE", "vocab": vocab, "merges": merges, **settings}

    def _listed_merges(self) -> list[list[str]]:
        merges = self.file.required("tokenizer.ggml.merges")
        pairs = [[merge[: (cut := merge.find(" ", 1))], merge[cut + 1 :]] for merge in merges]
        if any(" " not in merge[1:] for merge in merges):
            raise self.error("a merge that is not two tokens")
        return pairs

    def _merges_by_score(self) -> list[list[str]]:
        """The merges in order: SentencePiece joins the two neighbours whose token has the highest score."""
        scores = self.file.required("tokenizer.ggml.scores")
        if len(scores) < len(self.tokens):
            raise self.error(f"{len(scores)} scores for {len(self.tokens)} tokens")
        ids = {token: i for i, token in enumerate(self.tokens)}
        merges = []
        for i in self.of_type(NORMAL, USER_DEFINED, UNUSED):
            token = self.tokens[i]
            parts = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
            pairs = [(ids[left], ids[right]) for left, right in parts if left in ids and right in ids]
            merges += [(-scores[i], i, *pair) for pair in sorted(pairs)]
        return [[self.tokens[left], self.tokens[right]] for _, _, left, right in sorted(merges)]

    def _content(
        self, bpe: dict[str, Any], normalizer: Any, pre: Any, decoder: Any, *, add_bos: bool
    ) -> dict[str, Any]:
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": self._added(),
            "normalizer": normalizer,
            "pre_tokenizer": pre,
            "post_processor": self._post_processor(add_bos),
            "decoder": decoder,
            "model": bpe,
        }

    def _added(self) -> list[dict[str, Any]]:
        """Tokens that are matched before the text is split."""
        name = str(self.file.field("general.name") or "").lower()
        strips = any(phi in name for phi in ("phi-3", "phi3"))
        plain = {"single_word": False, "lstrip": False, "normalized": False}
        return [
            {
                **plain,
                "id": i,
                "content": self.tokens[i],
                "special": self._types[i] != USER_DEFINED,
                "rstrip": strips and self.tokens[i] not in ("<unk>", "<s>", "<|endoftext|>"),
            }
            for i in self.of_type(UNKNOWN, CONTROL, USER_DEFINED)
        ]

    def _post_processor(self, add_bos: bool) -> dict[str, Any]:
        """The template that adds the start and the end token to a text.

        Args:
            add_bos: add the start token if the file does not say whether to add it.
        """
        added = {}
        for kind, default in (("bos", add_bos), ("eos", False)):
            stated = self.file.field(f"tokenizer.ggml.add_{kind}_token")
            if default if stated is None else stated:
                if (token := self.token(kind)) is None:
                    raise self.error(f"add_{kind}_token, and no {kind}_token_id")
                added[kind] = token
        special = {kind: {"SpecialToken": {"id": token, "type_id": 0}} for kind, token in added.items()}
        parts = [special.get("bos"), {"Sequence": {"id": "A", "type_id": 0}}, special.get("eos")]
        single = [part for part in parts if part is not None]
        tokens = {
            token: {"id": token, "ids": [self.tokens.index(token)], "tokens": [token]} for token in added.values()
        }
        second = [{kind: {**value, "type_id": 1} for kind, value in part.items()} for part in single]
        pair = single + [{"Sequence": {"id": "B", "type_id": 1}} if "Sequence" in part else part for part in second]
        return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens}
