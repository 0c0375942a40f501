"""Tokenizers of every kind with a few dozen tokens, and the strings for their tests."""

from __future__ import annotations

import itertools
import json
import random

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
RIGHT_ALIGNED = r"\p{N}{1,3}(?=(?:\p{N}{3})*(?:\P{N}|$))|\P{N}+"
CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}]*[\p{Ll}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}]+[\p{Ll}]*|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
)


def corpus(alphabet: str, seed: int, count: int = 300) -> list[str]:
    """Random texts with some frequent words."""
    rng = random.Random(seed)
    words = ["".join(rng.choices(alphabet, k=rng.randint(1, 5))) for _ in range(12)]
    return ["".join(rng.choices(words, k=rng.randint(1, 6))) for _ in range(count)]


def byte_level(
    alphabet: str, pattern: str | None, seed: int, *, ignore_merges: bool = False, size: int = 40
) -> Tokenizer:
    """Byte-level BPE. Without a pattern, merges cross all borders, also of characters."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = [pre_tokenizers.Split(Regex(pattern), "isolated")] if pattern else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, bytes_only])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(corpus(alphabet, seed), trainer)
    return tokenizer


def across_characters() -> Tokenizer:
    """Byte-level BPE whose first merges join the last byte of a character to the first of the next."""
    a9, a8, c3, a = "©", "¨", "Ã", "a"
    return by_merges((a9, c3), (a8, c3), (a9 + c3, a8), (a9, a), (a8 + c3, a9), (a, c3), (a9 + c3, a9 + c3))


def by_merges(*merges: tuple[str, str], pattern: str = "", whole: tuple[str, ...] = ()) -> Tokenizer:
    """Byte-level BPE with these merges, written in the characters that stand for bytes, and with tokens that are whole
    pieces only."""
    letters = pre_tokenizers.ByteLevel.alphabet()
    vocab = {token: i for i, token in enumerate([*sorted(letters), *(x + y for x, y in merges), *whole])}
    tokenizer = Tokenizer(models.BPE(vocab, list(merges), ignore_merges=bool(whole)))
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = [pre_tokenizers.Split(Regex(pattern), "isolated")] if pattern else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, bytes_only])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_fallback(alphabet: str, seed: int) -> Tokenizer:
    """A SentencePiece BPE model in this library: one piece per text, bytes for characters without a token."""
    marked = [text.replace(" ", "▁") for text in corpus(alphabet, seed)]
    trained = Tokenizer(models.BPE())
    trained.train_from_iterator(marked, trainers.BpeTrainer(vocab_size=40, show_progress=False))
    state = json.loads(trained.to_str())["model"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    vocab = {token: i for i, token in enumerate([*bytes_, *state["vocab"]])}
    merges = [tuple(pair) for pair in state["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def unigram(alphabet: str, seed: int) -> Tokenizer:
    """A Unigram model with random scores; words begin at spaces."""
    rng = random.Random(seed)
    letters = alphabet.replace(" ", "▁")
    pieces = {"".join(rng.choices(letters, k=k)) for k in (1, 2, 2, 3, 3, 4) for _ in range(8)}
    pieces = {p for p in pieces if "▁" not in p[1:]} | set(letters)
    return by_scores({piece: -rng.uniform(1, 2) * len(piece) ** 0.6 for piece in sorted(pieces)})


def by_scores(scores: dict[str, float]) -> Tokenizer:
    """A Unigram model with these pieces."""
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), *scores.items()], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


KINDS = {
    "plain": ("ab ", 7, lambda alphabet, seed: byte_level(alphabet, None, seed)),
    "gpt2": ("a s'\n", 5, lambda alphabet, seed: byte_level(alphabet, GPT2, seed)),
    "llama3": ("1as'\n ", 5, lambda alphabet, seed: byte_level(alphabet, LLAMA3, seed, ignore_merges=True)),
    "right-aligned digits": ("12a", 7, lambda alphabet, seed: byte_level(alphabet, RIGHT_ALIGNED, seed)),
    "cased": ("aB 1", 6, lambda alphabet, seed: byte_level(alphabet, CASED, seed)),
    "inside characters": ("éè中a", 5, lambda alphabet, seed: byte_level(alphabet, None, seed)),
    "across characters": ("éèa", 7, lambda *_: across_characters()),
    "byte fallback": ("ab é", 5, lambda _, seed: byte_fallback("ab ", seed)),
    "unigram": ("ab ", 7, unigram),
}
"""Name -> characters of the strings, their greatest length, and what makes a tokenizer from alphabet and seed."""


def strings(alphabet: str, length: int) -> list[str]:
    """All strings up to a length."""
    return ["".join(letters) for n in range(length + 1) for letters in itertools.product(alphabet, repeat=n)]
