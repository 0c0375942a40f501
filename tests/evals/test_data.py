"""Texts: the built-in ones from a small stand-in cache, the user's files, and their tokens."""

import codecs
import hashlib
import json
import pydoc_data.topics
import random
import warnings

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ropewalk import DataError
from ropewalk.engine.checkpoints import assets
from ropewalk.evals import data
from ropewalk.evals.data import TEXTS, Text, load_text, tokenize_documents


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache in which kjv has three verses and Shakespeare two plays, so that nothing is downloaded."""
    monkeypatch.setenv("ROPEWALK_CACHE", str(tmp_path / "cache"))
    verses = [("Ruth", 1, 1, "Now it came"), ("Ruth", 1, 2, "to pass."), ("2 John", 12, 1, "The elder")]
    keys = ("book", "chapter", "verse", "text")
    kjv = assets.ASSETS["kjv"].folder
    kjv.mkdir(parents=True)
    lines = [json.dumps(dict(zip(keys, verse, strict=True))) + "\n" for verse in verses]
    (kjv / "kjv.jsonl").write_text("".join(lines))
    plays = assets.ASSETS["shakespeare"].folder
    (plays / "tragedies").mkdir(parents=True)
    (plays / "comedies").mkdir()
    (plays / "tragedies" / "hamlet.md").write_text("# Hamlet\n")
    (plays / "comedies" / "twelfth-night.md").write_text("# Twelfth Night\n")


def test_kjv_is_one_document_with_a_heading_for_each_chapter(cache):
    text = load_text("kjv")
    assert text.documents == ("Ruth 1\nNow it came to pass.\n\n2 John 12\nThe elder\n\n",)


def test_shakespeare_is_one_document_a_play_sorted_by_path(cache):
    assert load_text("shakespeare").documents == ("# Twelfth Night\n", "# Hamlet\n")


def test_pydoc_holds_every_topic_in_order():
    (document,) = load_text("pydoc").documents
    topics = pydoc_data.topics.topics
    position = 0
    for name in sorted(topics):
        position = document.index(topics[name].strip(), position)


def test_stdlib_is_one_long_document_without_tests():
    (document,) = load_text("stdlib").documents
    assert len(document) > 5_000_000
    headings = [line[2:] for line in document.splitlines() if line.startswith("# ") and line.endswith(".py")]
    for module in ("argparse.py", "asyncio/base_events.py", "zipfile"):
        assert any(heading.startswith(module) for heading in headings)
    ours = [h for h in headings if h.startswith(("test/", "unittest/test", "site-packages/", "_sysconfigdata"))]
    assert ours == []


def test_a_file_is_one_document_without_its_mark(tmp_path):
    file = tmp_path / "notes.anything"
    file.write_bytes(codecs.BOM_UTF8 + "naïve\r\ntext\n".encode())
    text = load_text(file)
    assert text.documents == ("naïve\ntext\n",)
    assert text.name == str(file)


def test_a_folder_is_one_document_a_file(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    for name, body in {
        "b.txt": "b",
        "a.MD": "a",
        "sub/c.py": "c",
        "empty.txt": " \n",
        "image.png": "no",
        ".hidden.txt": "no",
        ".git/x.txt": "no",
    }.items():
        (tmp_path / name).write_text(body)
    assert load_text(tmp_path).documents == ("a", "b", "c")


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_a_bad_encoding_names_file_and_offset(tmp_path, mark):
    file = tmp_path / "latin.txt"
    file.write_bytes(mark + "ü".encode() + b"caf\xe9 au lait")
    with pytest.raises(DataError, match=rf"latin.txt is not UTF-8: byte 0xe9 at offset {len(mark) + 5}"):
        load_text(file)
    with pytest.raises(DataError, match=r"latin.txt is not UTF-8"):
        load_text(tmp_path)


def test_what_is_not_there_is_named_with_what_is_near(tmp_path):
    (tmp_path / "moby-dick.txt").write_text("Call me Ishmael.")
    with pytest.raises(DataError, match="Did you mean 'shakespeare'"):
        load_text("shakespear")
    with pytest.raises(DataError, match=r"Did you mean '.*moby-dick.txt'"):
        load_text(tmp_path / "mobydick.txt")
    with pytest.raises(DataError, match="Known: chinese, code, kjv, pydoc, shakespeare, stdlib"):
        load_text("/nowhere/at/all")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "A long text. " * 60,
            r"'A long text.*\.\.\..*' cannot be read \(File name too long\); give the name of a built-in text",
        ),
        ("~nobody-of-that-name/text", "cannot be read .*home directory"),
        ("", "there is no text or file ''"),
    ],
)
def test_what_is_no_path_is_refused(name, words, tmp_path, monkeypatch):
    (tmp_path / "other.txt").write_text("not asked for")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=words):
        load_text(name)


def test_nothing_to_read(tmp_path):
    (tmp_path / "blank.txt").write_text(" \n\n")
    with pytest.raises(DataError, match="holds only blanks"):
        load_text(tmp_path / "blank.txt")
    with pytest.raises(DataError, match="holds only blanks"):
        load_text(tmp_path)
    (tmp_path / "blank.txt").rename(tmp_path / "blank.bin")
    with pytest.raises(DataError, match=r"holds no text file; these suffixes are read: \.c \.cpp"):
        load_text(tmp_path)


def test_the_digest_depends_on_content_and_on_where_documents_end(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("two")
    expected = hashlib.sha256(bytes([0] * 7 + [3]) + b"one" + bytes([0] * 7 + [3]) + b"two")
    digest = load_text(tmp_path).sha256
    assert digest == expected.hexdigest()
    (tmp_path / "a.txt").write_text("onet")
    (tmp_path / "b.txt").write_text("wo")
    assert load_text(tmp_path).sha256 != digest


def test_every_name_is_described():
    assert set(TEXTS) == set(data._BUILT_IN)
    assert set(assets.ASSETS) - set(assets.MODELS) <= set(TEXTS)


def byte_level(samples):
    """GPT-2's kind, with a start token before every text and a low model_max_length."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(samples, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", model_max_length=16)


def whole_text_bpe(samples):
    """Gemma's kind: spaces become a mark and merges cross words, as nothing is split beforehand."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False, max_token_length=8)
    tokenizer.train_from_iterator((line for s in samples for line in s[:20_000].splitlines(True)), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def unigram(samples):
    """T5's kind: the most probable cut of each word."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=400, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator((s[:50_000] for s in samples), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.fixture(scope="module")
def pydoc_text():
    """Prose, tables, indented code and, at its end, long runs of blanks and of one letter."""
    document = load_text("pydoc").documents[0][:120_000] + " \n\n\n    " * 300 + "a" * 3000 + "\n\n  z"
    return Text(name="t", documents=(document, "short"), sha256="0" * 64)


@pytest.mark.parametrize("build", [byte_level, whole_text_bpe, unigram])
def test_a_limit_gives_the_beginning_of_the_full_encoding(build, pydoc_text):
    tokenizer = build(pydoc_text.documents[:1])
    full = tokenizer(list(pydoc_text.documents), add_special_tokens=False, verbose=False).input_ids
    assert tokenize_documents(pydoc_text, tokenizer) == full
    generator = random.Random(1)
    limits = [1, 2, len(full[0]) - 1, len(full[0]), len(full[0]) + 9]
    for limit in [*limits, *(generator.randrange(1, len(full[0])) for _ in range(12))]:
        assert tokenize_documents(pydoc_text, tokenizer, limit_tokens=limit) == [ids[:limit] for ids in full]


@pytest.mark.parametrize("build", [byte_level, whole_text_bpe, unigram])
def test_a_limit_holds_wherever_the_text_is_cut(build, pydoc_text, monkeypatch):
    """With a guess of two characters a token the cut comes close to the last token asked for."""
    monkeypatch.setattr(data, "_CHARACTERS", 2)
    document = pydoc_text.documents[0]
    tokenizer = build([document])
    for beginning in (document[:1500], document[2000:3500], "\n\n    " * 200, "a" * 1000 + " b"):
        (full,) = tokenizer([beginning], add_special_tokens=False, verbose=False).input_ids
        text = Text(name="t", documents=(beginning,), sha256="")
        wrong = [n for n in range(1, 250) if tokenize_documents(text, tokenizer, limit_tokens=n) != [full[:n]]]
        assert wrong == []


def test_a_limit_encodes_little_more_than_it_returns(pydoc_text, monkeypatch):
    tokenizer = byte_level(pydoc_text.documents[:1])
    seen = []
    encode = data._encode
    monkeypatch.setattr(data, "_encode", lambda documents, t: seen.extend(documents) or encode(documents, t))
    tokenize_documents(pydoc_text, tokenizer, limit_tokens=500)
    assert max(map(len, seen)) < 8000


def test_no_special_tokens_and_no_warning(pydoc_text, caplog):
    tokenizer = byte_level(pydoc_text.documents[:1])
    assert tokenizer("a <s>").input_ids.count(0) == 2, "the tokenizer adds a start token and knows its name"
    text = Text(name="t", documents=("a <s> b" * 50,), sha256="")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (ids,) = tokenize_documents(text, tokenizer)
    assert 0 not in ids
    assert tokenizer.decode(ids) == text.documents[0]
    assert caplog.records == []


def test_tokens_are_kept_and_callers_cannot_change_them(pydoc_text, monkeypatch):
    tokenizer = byte_level(pydoc_text.documents[:1])
    first = tokenize_documents(pydoc_text, tokenizer)
    monkeypatch.setattr(data, "_encode", lambda *_: pytest.fail("encoded twice"))
    first[0].clear()
    assert len(tokenize_documents(pydoc_text, tokenizer)[0]) > 1000


@pytest.mark.model
def test_the_real_texts_have_the_expected_content():
    assert load_text("kjv").sha256.startswith("d2f444fd")
    assert load_text("shakespeare").sha256.startswith("054707bc")
    assert load_text("kjv").documents[0].startswith("Genesis 1\nIn the beginning God created")
