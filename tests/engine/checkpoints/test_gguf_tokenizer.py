"""Tokenizers of GGUF files give the same ids as the original tokenizer."""

import json
from pathlib import Path

import gguf
import mistral_common
import pytest
import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import ropewalk as rw
from ropewalk.engine.checkpoints.gguf_file import GgufFile
from ropewalk.engine.checkpoints.gguf_tokenizer import end_ids, read_gguf_tokenizer
from ropewalk.engine.checkpoints.source import load_vocabulary

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPM = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"

TEXTS = [
    "It wasn't the first time I'D seen them: we'll say 12,345 of 1024 (all!) gone by 9:30\n\n\tUPPER CamelCase  \n end",
    "def f(x):\r\n    return x ** 2  # ¿qué?\n\n\n\n        pass\n",
    "  two spaces first, three   inside, and two last  ",
    "绳索工坊 2024年3月15日，これは日本語です。한국어도 있습니다。 Привет née naïve cafe\u0301 I ❤️ it 👍🏽 x²½",
    "''''''```````\"\"\"\"......!!!!!!??????$$$ <|x|> =1 ~3 `a` 1+1=2 ^ |",
]

# The expressions as they stand in the tokenizer.json of Llama 3, Qwen2, Mistral-Nemo, Phi-4-mini and DeepSeek-V3.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK = (
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
)
WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def splits(*expressions):
    steps = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in expressions]
    return pre_tokenizers.Sequence([*steps, BYTES])


DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), WORDS])
FALCON = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Punctuation("contiguous"),
        WORDS,
        pre_tokenizers.Digits(individual_digits=False),
        pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
    ]
)
SPLITS = {
    "gpt-2": WORDS,
    "olmo": WORDS,
    "exaone4": WORDS,
    "smollm": DIGITS,
    "minerva-7b": DIGITS,
    "exaone": DIGITS,
    "starcoder": DIGITS,
    "llama-bpe": splits(LLAMA3),
    "falcon3": splits(LLAMA3),
    "smaug-bpe": splits(LLAMA3),
    "glm4": splits(LLAMA3),
    "qwen2": splits(QWEN2),
    "deepseek-r1-qwen": splits(QWEN2),
    "stablelm2": splits(QWEN2),
    "tekken": splits(TEKKEN),
    "gpt-4o": splits(GPT4O),
    "deepseek-v3": splits(r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+", DEEPSEEK),
    "falcon": FALCON,
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ROPEWALK_CACHE", str(tmp_path / "cache"))


def trained(splitter, size=700):
    """A byte-level BPE that is trained on the pieces of these pre-tokenizers."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = splitter, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return tokenizer


@pytest.fixture
def write(tmp_path):
    """A function that writes a vocabulary as a GGUF file without tensors."""

    def write(tokens, *, model="gpt2", pre="gpt-2", types=None, merges=(), scores=None, name="a model", **fields):
        path = tmp_path / "vocabulary.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_name(name)
        writer.add_tokenizer_model(model)
        if pre is not None:
            writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types(types or [NORMAL] * len(tokens))
        if scores is not None:
            writer.add_token_scores(scores)
        if merges:
            writer.add_token_merges(merges)
        for key, value in fields.items():
            add = writer.add_bool if isinstance(value, bool) else writer.add_uint32
            add(f"tokenizer.ggml.{key}", value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


def listed(tokenizer):
    """The tokens and merges of a BPE as GGUF lists them."""
    model = json.loads(tokenizer.to_str())["model"]
    return {
        "tokens": sorted(model["vocab"], key=model["vocab"].get),
        "merges": [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]],
    }


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("pre", SPLITS)
def test_texts_are_split_as_the_tokenizer_was_trained(write, pre):
    original = trained(SPLITS[pre])
    parts = listed(original)
    tokenizer = read_gguf_tokenizer(GgufFile(write(parts.pop("tokens"), **parts, pre=pre, add_bos_token=False)))
    for text in TEXTS:
        assert ids(tokenizer, text) == original.encode(text).ids
        assert tokenizer.decode(ids(tokenizer, text)) == text


def test_names_that_mean_something_else_are_told_apart():
    """Otherwise the test above could not fail."""
    made = {tuple(tuple(trained(splitter).encode(text).tokens) for text in TEXTS) for splitter in SPLITS.values()}
    assert len(made) == len({splitter.__getstate__() for splitter in SPLITS.values()}) == 8


LETTERS = [*"abc", "Ġ", "ab", "abc", "<s>", "</s>", "<u>", "<two>"]
KINDS = [*[NORMAL] * 6, *[CONTROL] * 3, USER_DEFINED]


@pytest.mark.parametrize(
    ("pre", "expected"), [("llama-bpe", [5]), ("tekken", [5]), ("gpt-2", [4, 2]), ("qwen2", [4, 2])]
)
def test_a_piece_that_is_a_token_is_taken_whole_where_the_name_says_so(write, pre, expected):
    path = write(LETTERS, types=KINDS, pre=pre, merges=["a b"], bos_token_id=6)
    assert ids(read_gguf_tokenizer(GgufFile(path)), "abc") == expected
    assert load_vocabulary(path).encode_piece(b"abc") == expected


@pytest.mark.parametrize(
    ("pre", "fields", "expected"),
    [
        ("llama-bpe", {}, [6, 0]),
        ("tekken", {}, [6, 0]),
        ("falcon3", {}, [6, 0]),
        ("gpt-2", {}, [0]),
        ("smaug-bpe", {}, [0]),
        ("qwen2", {"add_bos_token": True}, [6, 0]),
        ("llama-bpe", {"add_bos_token": False}, [0]),
        ("llama-bpe", {"add_eos_token": True}, [6, 0, 7]),
        ("gpt-2", {"add_eos_token": True, "add_bos_token": False}, [0, 7]),
    ],
)
def test_what_is_put_around_a_text(write, tmp_path, pre, fields, expected):
    path = write(LETTERS, types=KINDS, pre=pre, merges=["a b"], bos_token_id=6, eos_token_id=7, **fields)
    tokenizer = read_gguf_tokenizer(GgufFile(path))
    assert tokenizer("a").input_ids == expected
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (6, 7)
    tokenizer.save_pretrained(tmp_path / "saved")
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path / "saved")("a").input_ids == expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pre": "unheard-of"}, "has tokenizer.ggml.pre 'unheard-of', so the pre-tokenizer is unknown"),
        ({"pre": "minerva-7"}, "Did you mean 'minerva-7b'"),
        ({"pre": None}, "has no tokenizer.ggml.pre, so"),
        ({"pre": "kimi-k2"}, "has tokenizer.ggml.pre 'kimi-k2'"),
        ({"pre": "llama-bpe"}, "add_bos_token, and no bos_token_id"),
        ({"add_eos_token": True}, "add_eos_token, and no eos_token_id"),
        ({"eos_token_id": 10}, "eos_token_id 10, and 10 tokens"),
        ({"merges": ["ab"]}, "a merge that is not two tokens"),
        ({"merges": ["a x"]}, "do not fit together"),
        ({"types": [NORMAL]}, "1 token types for 10 tokens"),
        ({"tokens": [*LETTERS, "a"]}, "the token 'a' twice"),
        ({"model": "bert"}, "cannot read this GGUF file"),
    ],
)
def test_what_a_file_leaves_open_or_contradicts_is_refused(write, options, words):
    tokens = options.pop("tokens", LETTERS)
    path = write(tokens, **{"merges": ["a b"]} | options)
    with pytest.raises(rw.UnsupportedModel, match=words):
        read_gguf_tokenizer(GgufFile(path))


def test_special_tokens_keep_their_ids_whatever_they_are_called(write):
    """DeepSeek's names have characters that stand for no byte."""
    names = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>"]
    tokens = [*"abc", "ab", *names, "Ġ c"]
    kinds = [*[NORMAL] * 4, *[CONTROL] * 3, USER_DEFINED]
    path = write(tokens, types=kinds, pre="deepseek-r1-qwen", merges=["a b"], bos_token_id=4, eos_token_id=5)
    tokenizer = read_gguf_tokenizer(GgufFile(path))
    assert len(tokenizer) == len(tokens)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (4, 5)
    assert ids(tokenizer, "ab<｜User｜>bĠ cc") == [3, 6, 1, 7, 2]


# Where a text ends


def ends(path):
    return set(end_ids(GgufFile(path)))


def test_every_end_token_of_the_fields_ends_a_text(write):
    fields = {f"{kind}_token_id": i for i, kind in enumerate(("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep"))}
    assert ends(write(LETTERS, **fields)) == set(range(6))
    assert ends(write(LETTERS, eos_token_id=7, eot_token_id=3)) == {7, 3}
    assert end_ids(GgufFile(write(LETTERS, eos_token_id=7, eot_token_id=3)))[0] == 7
    assert ends(write(LETTERS)) == set()


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["<|end_of_text|>", "<|eot_id|>", "<|start|>"], {1, 2}),
        (["<|end|>", "<|message|>"], {1}),
        (["<|end|>", "<|return|>", "<|call|>"], {2, 3}),
        (["</s>", "<|tool_response>", "<turn|>"], {2, 3}),
    ],
)
def test_control_tokens_end_a_text_by_their_names(write, names, expected):
    """As in llama.cpp, whose conversion writes only one of them."""
    assert ends(write(["a", *names], types=[NORMAL, *[CONTROL] * len(names)])) == expected
    assert ends(write(["a", *names])) == set()


# SentencePiece


@pytest.fixture(scope="module")
def processor():
    return sentencepiece.SentencePieceProcessor(model_file=str(SPM))


@pytest.fixture
def written(write, processor):
    """A function that writes Mistral 7B's vocabulary."""

    def written(**fields):
        count = range(processor.get_piece_size())
        kinds = {"is_unknown": UNKNOWN, "is_control": CONTROL, "is_byte": BYTE}
        types = [next((kind for test, kind in kinds.items() if getattr(processor, test)(i)), NORMAL) for i in count]
        return write(
            [processor.id_to_piece(i) for i in count],
            model="llama",
            pre="default",
            types=types,
            scores=[processor.get_score(i) for i in count],
            **fields,
        )

    return written


def test_a_sentencepiece_vocabulary_gives_sentencepieces_ids(written, processor):
    tokenizer = read_gguf_tokenizer(GgufFile(written()))
    for text in TEXTS:
        assert ids(tokenizer, text) == processor.encode(text)
        assert tokenizer.decode(ids(tokenizer, text)) == text
    assert tokenizer("a").input_ids == [1, *processor.encode("a")]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)


def test_a_sentencepiece_vocabulary_need_not_put_a_space_first(written, processor):
    tokenizer = read_gguf_tokenizer(GgufFile(written(add_space_prefix=False, add_bos_token=False, add_eos_token=True)))
    for text in TEXTS:
        bare = ids(tokenizer, text)
        assert tokenizer.decode(bare) == text
        assert bare == processor.encode("\n" + text)[2:], text  # behind the space and the line feed
    assert tokenizer("a").input_ids == [*ids(tokenizer, "a"), 2]


def test_phi_3_takes_the_spaces_behind_its_special_tokens(write):
    tokens, kinds = ["<unk>", "<s>", "</s>", "▁", "a", "<|user|>", "\n"], [UNKNOWN, CONTROL, CONTROL, 1, 1, CONTROL, 1]
    options = {"model": "llama", "types": kinds, "scores": [0.0] * 7, "add_space_prefix": False}
    for name, expected in (("Phi-3 mini", [5, 4]), ("another", [5, 6, 4])):
        assert ids(read_gguf_tokenizer(GgufFile(write(tokens, name=name, **options))), "<|user|>\na") == expected


def test_added_tokens_are_written_and_read(write):
    """The flags of each `AddedToken` agree with its type."""
    tokenizer = read_gguf_tokenizer(GgufFile(write(LETTERS, types=KINDS, merges=["a b"])))
    added = tokenizer.added_tokens_decoder
    assert added[9] == AddedToken("<two>", normalized=False, special=False)
    assert added[6] == AddedToken("<s>", normalized=False, special=True)
    assert sorted(added) == [6, 7, 8, 9]
