"""The tokenizer of a GGUF file, with all that its fields say and imply in llama.cpp."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ...errors import RopewalkError, UnsupportedModel, did_you_mean, first_line
from .gguf_pretokenizers import PRE_TOKENIZERS

if TYPE_CHECKING:
    from .gguf_file import GgufFile

__all__ = ["END_NAMES", "build_tokenizer", "end_ids"]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # values of `tokenizer.ggml.token_type`

_ENDS = (
    "<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> </s> <|eom_id|> "
    "<EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos> <turn|> <|tool_response> <｜end▁of▁sentence｜> "
    "[e~[ <|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD] <|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame> "
    "<|file_sep|>"
)
END_NAMES = frozenset(_ENDS.split())
"""Control tokens that end a text in llama.cpp by their names."""

_END_KEYS = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
_SPM_IDS = {"bos": 1, "eos": 2, "unknown": 0}  # where a SentencePiece vocabulary does not say
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


def build_tokenizer(file: GgufFile) -> Any:
    """The transformers tokenizer of a file whose vocabulary is a byte-level BPE ("gpt2") or a SentencePiece BPE
    ("llama").

    Raises:
        UnsupportedModel: a way of splitting that is not known, or fields that are missing or contradict each other.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    with _reading(file):
        vocabulary = _Vocabulary(file)
        described = vocabulary.byte_level() if vocabulary.model == "gpt2" else vocabulary.sentencepiece()
        backend = Tokenizer.from_str(json.dumps(described))
        named = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
        special = {f"{kind}_token": vocabulary.token(name) for name, kind in named.items()}
        template = file.field("tokenizer.chat_template")
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **special)
    if len(tokenizer) > len(vocabulary.tokens):
        raise UnsupportedModel(
            f"{file.path}: its tokenizer's fields make {len(tokenizer)} tokens of its list of {len(vocabulary.tokens)}"
        )
    return tokenizer


def end_ids(file: GgufFile) -> list[int]:
    """Ids of the tokens that end a text, the first of them the file's end token: those of the fields, and those that
    llama.cpp knows by name.

    Raises:
        UnsupportedModel: damaged fields.
    """
    with _reading(file):
        vocabulary = _Vocabulary(file)
        ids = [vocabulary.id(kind) for kind in _END_KEYS]
        by_name = [i for i in vocabulary.of_type(CONTROL) if vocabulary.tokens[i] in END_NAMES]
    names = {vocabulary.tokens[i] for i in by_name}
    apart = set()  # names that end a text, but not beside certain others
    if names >= {"<|return|>", "<|call|>"} or names >= {"<|calls|>", "<|flush|>"}:
        apart.add("<|end|>")
    if "<|tool_response>" in names:
        apart.add("</s>")
    found = [*ids, *(i for i in by_name if vocabulary.tokens[i] not in apart)]
    return list(dict.fromkeys(i for i in found if i is not None))


@contextlib.contextmanager
def _reading(file: GgufFile) -> Iterator[None]:
    """Name the file whatever its fields hold."""
    try:
        yield
    except RopewalkError:
        raise
    except Exception as error:  # a damaged field has any type, and tokenizers raises no class of its own
        raise UnsupportedModel(
            f"{file.path}: its tokenizer's fields do not fit together ({first_line(error)})"
        ) from error


class _Vocabulary:
    """The fields of a file below `tokenizer.ggml.`."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self.model = file.required("tokenizer.ggml.model")
        tokens = file.required("tokenizer.ggml.tokens")
        self.tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
        self._types = file.field("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
        if len(self._types) < len(tokens):
            raise self.wrong(f"{len(self._types)} token types for {len(tokens)} tokens")
        if len(set(self.tokens)) < len(tokens):
            twice = next(token for i, token in enumerate(self.tokens) if self.tokens.index(token) < i)
            raise self.wrong(f"the token {twice!r} twice")

    def wrong(self, what: str) -> UnsupportedModel:
        return UnsupportedModel(f"{self.file.path}: its tokenizer has {what}; get the file again, or convert it anew")

    def of_type(self, *types: int) -> list[int]:
        return [i for i, kind in enumerate(self._types[: len(self.tokens)]) if kind in types]

    def id(self, kind: str) -> int | None:
        """The id of a special token, or None."""
        found: int | None = self.file.field(f"tokenizer.ggml.{kind}_token_id")
        if found is None and self.model == "llama" and len(self.tokens) > 2:
            found = _SPM_IDS.get(kind)
        if found is not None and not 0 <= found < len(self.tokens):
            raise self.wrong(f"{kind}_token_id {found}, and {len(self.tokens)} tokens")
        return found

    def token(self, kind: str) -> str | None:
        found = self.id(kind)
        return None if found is None else self.tokens[found]

    def byte_level(self) -> dict[str, Any]:
        """As tokenizer.json."""
        name = self.file.field("tokenizer.ggml.pre")
        if name not in PRE_TOKENIZERS:
            said = "no tokenizer.ggml.pre" if name is None else f"tokenizer.ggml.pre {name!r}"
            raise UnsupportedModel(
                f"{self.file.path} has {said}, so how its tokenizer splits texts is not known; load the original "
                f"checkpoint, or convert it again with a newer llama.cpp.{did_you_mean(name or '', PRE_TOKENIZERS)}"
            )
        pre = PRE_TOKENIZERS[name]
        bpe = self._bpe(self._listed_merges(), ignore_merges=pre.ignore_merges)
        decoder = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
        steps = {"type": "Sequence", "pretokenizers": list(pre.steps)}
        return self._described(bpe, None, steps, decoder, add_bos=pre.add_bos)

    def sentencepiece(self) -> dict[str, Any]:
        """As tokenizer.json. Every stretch of text, also behind a special token, begins with a space of the
        tokenizer's own unless add_space_prefix says no."""
        prefix = self.file.field("tokenizer.ggml.add_space_prefix") is not False
        spaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
        written = [{"type": "Prepend", "prepend": _SPACE}] * prefix + [spaces]
        read = [
            {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            *[{"type": "Strip", "content": " ", "start": 1, "stop": 0}] * prefix,
        ]
        bpe = self._bpe(self._merges_by_score(), byte_fallback=True, fuse_unk=True, unk_token=self.token("unknown"))
        normalizer = {"type": "Sequence", "normalizers": written}
        return self._described(bpe, normalizer, None, {"type": "Sequence", "decoders": read}, add_bos=True)

    def _bpe(self, merges: list[list[str]], **settings: Any) -> dict[str, Any]:
        vocab = {token: i for i, token in enumerate(self.tokens)}
        return {"type": "BPE", "vocab": vocab, "merges": merges, **settings}

    def _listed_merges(self) -> list[list[str]]:
        merges = self.file.required("tokenizer.ggml.merges")
        pairs = [[merge[: (cut := merge.find(" ", 1))], merge[cut + 1 :]] for merge in merges]
        if any(" " not in merge[1:] for merge in merges):
            raise self.wrong("a merge that is not two tokens")
        return pairs

    def _merges_by_score(self) -> list[list[str]]:
        """SentencePiece joins the two neighbours whose token has the highest score."""
        scores = self.file.required("tokenizer.ggml.scores")
        if len(scores) < len(self.tokens):
            raise self.wrong(f"{len(scores)} scores for {len(self.tokens)} tokens")
        known = {token: i for i, token in enumerate(self.tokens)}
        found = []
        for i in self.of_type(NORMAL, USER_DEFINED, UNUSED):
            token = self.tokens[i]
            parts = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
            pairs = [(known[left], known[right]) for left, right in parts if left in known and right in known]
            found += [(-scores[i], i, *pair) for pair in sorted(pairs)]
        return [[self.tokens[left], self.tokens[right]] for _, _, left, right in sorted(found)]

    def _described(
        self, bpe: dict[str, Any], normalizer: Any, pre: Any, decoder: Any, *, add_bos: bool
    ) -> dict[str, Any]:
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": self._added(),
            "normalizer": normalizer,
            "pre_tokenizer": pre,
            "post_processor": self._frame(add_bos),
            "decoder": decoder,
            "model": bpe,
        }

    def _added(self) -> list[dict[str, Any]]:
        """Tokens that are matched before anything else."""
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

    def _frame(self, add_bos: bool) -> dict[str, Any]:
        """What is put around a text."""
        around = {}
        for kind, implied in (("bos", add_bos), ("eos", False)):
            said = self.file.field(f"tokenizer.ggml.add_{kind}_token")
            if implied if said is None else said:
                if (token := self.token(kind)) is None:
                    raise self.wrong(f"add_{kind}_token, and no {kind}_token_id")
                around[kind] = token
        metadata = {kind: {"SpecialToken": {"id": token, "type_id": 0}} for kind, token in around.items()}
        parts = [metadata.get("bos"), {"Sequence": {"id": "A", "type_id": 0}}, metadata.get("eos")]
        single = [part for part in parts if part is not None]
        tokens = {
            token: {"id": token, "ids": [self.tokens.index(token)], "tokens": [token]} for token in around.values()
        }
        second = [{kind: {**part, "type_id": 1} for kind, part in one.items()} for one in single]
        pair = single + [{"Sequence": {"id": "B", "type_id": 1}} if "Sequence" in one else one for one in second]
        return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens}
