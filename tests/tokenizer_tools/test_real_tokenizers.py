"""Real tokenizers without a model: the tokens of an uncut text start with a cover of every prompt cut from it."""

from __future__ import annotations

import io
import random
import shutil
from pathlib import Path

import mistral_common
import pytest
import sentencepiece
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from small_tokenizers import GPT2, LLAMA3, RIGHT_ALIGNED, byte_level
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, LlamaTokenizer

from ropewalk.engine.checkpoints.source import resolve
from ropewalk.errors import UnsupportedModel
from ropewalk.tokenizer_tools.cover import cover
from ropewalk.tokenizer_tools.vocabularies import vocabulary

DATA = Path(mistral_common.__file__).parent / "data"
TEXTS = {
    "english": (
        "It wasn't the first time I'd seen them: we'll say that they've (all 12,345 of them!) gone by 9:30, and who's "
        'to blame?  Nobody -- "nobody", she said... The well-known http://www.example.com/index.html isn\'t up.\n\n'
        "\tA new paragraph; the UPPER CASE and CamelCase, 3.14159, 50% off, e.g. a_variable_name & so on.\n\n\nEnd. "
    ),
    "code": Path(random.__file__).read_text(encoding="utf-8"),
    "chinese": (
        "绳索工坊是一座又长又直的大厅，短绳在这里被编成长绳。大语言模型的词表越大，续写问题就越严重：如果提示词的结尾正好落在"
        "一个词元的中间，模型就无法自然地接下去。白云机场位于广州市，“白云”和“白云机场”是两个不同的词。2024年3月15日，"
        "研究人员发布了新的方法，价格为12345元；これは日本語です。한국어도 있습니다。"
    ),
    "metadata": "I ❤️ it 👍🏽👩‍👩‍👧‍👦 née naïve café 🇨🇳🇺🇸 क्षत्रिय ñ Ω≈ç√ x²—“quoted”\u00a0и по-русски 🙂🙂🙂 ̈ ﬁ １２ ",
}


@pytest.fixture(scope="module")
def trained_unigram(tmp_path_factory):
    """A real Unigram model, with SentencePiece's default normalizer (NFKC), dummy prefix and byte fallback."""
    text = tmp_path_factory.mktemp("unigram") / "text.txt"
    text.write_text("\n".join(list(TEXTS.values()) * 2), encoding="utf-8")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_writer=model,
        vocab_size=900,
        model_type="unigram",
        byte_fallback=True,
        hard_vocab_limit=False,
        character_coverage=0.99,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def nfkc():
    tokenizer = byte_level("abc de.", GPT2, 0, size=80)
    tokenizer.normalizer = normalizers.NFKC()
    return tokenizer


def t5_like():
    """Unigram with a normalizer that strips and collapses spaces."""
    letters = sorted(set("".join(TEXTS.values())) - set(" \n\t"))
    words = sorted({"▁" + word[:k] for word in TEXTS["english"].split() for k in (2, 4, 9)})
    tokenizer = Tokenizer(
        models.Unigram([("<unk>", 0.0), ("▁", -5.0), *((w, -6.0) for w in words), *((c, -4.0) for c in letters)], 0)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Strip(), normalizers.Replace("  ", " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


TOKENIZERS = {
    "smollm2": lambda: AutoTokenizer.from_pretrained(resolve("smollm2-135m")),
    "sentencepiece": lambda: sentencepiece.SentencePieceProcessor(model_file=str(DATA / "tokenizer.model.v1")),
    "tekken": lambda: Tekkenizer.from_file(DATA / "tekken_240911.json"),
    "tiktoken": lambda: Tekkenizer.from_file(DATA / "tekken_240718.json")._model,
    "llama 3 pattern": lambda: byte_level("".join(set(TEXTS["english"])), LLAMA3, 3, ignore_merges=True, size=300),
    "right-aligned digits": lambda: byte_level("0123456789 a", RIGHT_ALIGNED, 3, size=200),
    "nfkc": nfkc,
    "t5-like": t5_like,
}
NORMALIZING = ("nfkc", "t5-like", "unigram")
CASES = [pytest.param(name, marks=[pytest.mark.model] if name == "smollm2" else []) for name in TOKENIZERS]


@pytest.fixture(scope="module", params=[*CASES, "unigram"])
def known(request, trained_unigram):
    return vocabulary(trained_unigram if request.param == "unigram" else TOKENIZERS[request.param]())


def spans(seed, count):
    """Texts of up to 400 characters, and how many of their bytes are the prompt."""
    rng = random.Random(seed)
    for _ in range(count):
        text = rng.choice(list(TEXTS.values()))
        start = rng.randrange(max(1, len(text) - 400))
        span = text[start : start + rng.randint(2, 400)]
        yield span, rng.randint(1, len(span.encode()))


def test_the_tokens_of_the_uncut_text_start_with_a_cover(known, request):
    changed = 0
    for text, cut in spans(0, 100):
        covered = cover(known, text.encode()[:cut])
        tokens = known.encode(text)
        whole, reached, n = known.text_bytes(tokens), 0, 0
        if not whole.startswith(covered.text):  # the text after the prompt changes its normalization
            assert request.node.callspec.params["known"] in NORMALIZING, text
            changed += 1
            continue
        while reached < len(covered.text):
            reached += len(known.tokens[tokens[n]])
            n += 1
        sequence, last = tuple(tokens[:n]), known.tokens[tokens[n - 1]] if n else b""
        assert any(
            (node.aligned and covered.common_prefix + node.path == sequence)
            or (
                not node.aligned
                and covered.common_prefix + node.path == sequence[:-1]
                and last.startswith(node.suffix)
                and len(last) > len(node.suffix)
            )
            for node in covered.nodes
        ), (text.encode()[:cut][-20:], sequence[-4:])
        assert covered.prompt[: len(covered.common_prefix)] == covered.common_prefix
    assert changed < 20


def test_a_cover_has_few_nodes(known):
    sizes = [len({node.path for node in cover(known, text.encode()[:cut]).nodes}) for text, cut in spans(1, 60)]
    assert sum(sizes) / len(sizes) < 4
    assert max(sizes) <= 12


def test_bytes_of_the_tokens_are_the_text(known, request):
    if request.node.callspec.params["known"] in NORMALIZING:
        assert known.text_bytes(known.encode("ﬁ  a")).strip() != b"\xef\xac\x81  a"
        return
    for text, _ in spans(2, 40):
        ids = known.encode(text)
        assert known.text_bytes(ids) in (text.encode(), b" " + text.encode())  # some add a space first


def test_trailing_space_that_a_normalizer_strips_is_kept():
    known = vocabulary(t5_like())
    assert cover(known, "It was").text == b" It was"
    assert cover(known, "It was ").text == b" It was "
    assert known.text_bytes(list(cover(known, "It was ").prompt)) == b" It was "


def test_transformers_wrapper_of_sentencepiece_has_the_same_covers(tmp_path):
    shutil.copy(DATA / "tokenizer.model.v1", tmp_path / "tokenizer.model")
    bare = vocabulary(TOKENIZERS["sentencepiece"]())
    wrapped = vocabulary(LlamaTokenizer.from_pretrained(tmp_path))
    rng = random.Random(3)
    for text in (TEXTS["english"].replace("  ", " "), TEXTS["chinese"]):  # they split runs of spaces differently
        for _ in range(30):
            prompt = text.encode()[: rng.randint(1, 400)]
            a, b = cover(bare, prompt), cover(wrapped, prompt)
            assert a.nodes == b.nodes, prompt
            assert b.common_prefix[len(b.common_prefix) - len(a.common_prefix) :] == a.common_prefix


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1})), "is a WordPiece tokenizer"),
        (lambda: Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1})), "is a WordLevel tokenizer"),
        (lambda: Tokenizer(models.BPE({"a": 0}, [], dropout=0.1)), "dropout = 0.1"),
        (lambda: Tokenizer(models.BPE({"a</w>": 0}, [], end_of_word_suffix="</w>")), "end_of_word_suffix"),
        (lambda: Tokenizer(models.BPE({}, [])), "has no tokens"),
        (lambda: object(), "object is not supported"),
    ],
)
def test_tokenizers_whose_tokens_are_not_bytes_are_refused(make, reason):
    with pytest.raises(UnsupportedModel, match=reason):
        vocabulary(make())


def test_tekken_covers_include_tiktokens_unstable_encodings():
    """An independent oracle: tiktoken lists the other tokenizations that a text can get with more text."""
    encoding = TOKENIZERS["tiktoken"]()
    known = vocabulary(encoding)
    for prompt in ("import nump", "http:", "hello wor", " the", "x = 'a", "fo", "    ", "I'r"):
        stable, completions = encoding.encode_with_unstable(prompt)
        covered = cover(known, prompt)
        for completion in completions:
            sequence = (*stable, *completion)
            text = known.text_bytes(list(sequence))
            if len(text) <= len(prompt) or tuple(encoding.encode_ordinary(text.decode(errors="ignore"))) != sequence:
                continue
            reached, n = 0, 0
            while reached < len(prompt):
                reached += len(known.tokens[sequence[n]])
                n += 1
            assert any(
                covered.common_prefix + node.path == sequence[: n - (not node.aligned)] for node in covered.nodes
            ), (
                prompt,
                text,
            )
