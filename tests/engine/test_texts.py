"""One reader of a user's text: formats named by their first bytes, the same text through every door."""

import bz2
import codecs
import gzip
import io
import json
import lzma
import sys
import tarfile
import zipfile

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save

from ropewalk import DataError
from ropewalk.cli.main import cli
from ropewalk.engine.texts import read_documents, read_prompt
from ropewalk.evals.data import load_text

TEXT = "naïve 中文 😀\nimport os\n\nThe end\n"


def _archive(kind):
    held = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(held, "w") as archive:
            archive.writestr("a.txt", TEXT)
    else:
        with tarfile.open(fileobj=held, mode="w:gz") as archive:
            member = tarfile.TarInfo("a.txt")
            member.size = len(TEXT.encode())
            archive.addfile(member, io.BytesIO(TEXT.encode()))
    return held.getvalue()


READ = {
    "UTF-8": TEXT.encode(),
    "UTF-8 with its mark": TEXT.encode("utf-8-sig"),
    "UTF-16 little-endian": codecs.BOM_UTF16_LE + TEXT.encode("utf-16-le"),
    "UTF-16 big-endian": codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"),
    "UTF-32 little-endian": codecs.BOM_UTF32_LE + TEXT.encode("utf-32-le"),
    "UTF-32 big-endian": codecs.BOM_UTF32_BE + TEXT.encode("utf-32-be"),
    "line ends of Windows": TEXT.replace("\n", "\r\n").encode(),
    "line ends of old Macs": TEXT.replace("\n", "\r").encode(),
    "UTF-16 of Windows": TEXT.replace("\n", "\r\n").encode("utf-16"),
    "gzip": gzip.compress(TEXT.encode(), mtime=0),
    "two gzip members": gzip.compress(TEXT.encode()[:9], mtime=0) + gzip.compress(TEXT.encode()[9:], mtime=0),
    "gzip of UTF-16": gzip.compress(TEXT.encode("utf-16"), mtime=0),
    "bzip2": bz2.compress(TEXT.encode()),
    "xz": lzma.compress(TEXT.encode()),
}
# fmt: off
REFUSED = {
    "Parquet": (b"PAR1\x15\x04\x15\x10\x15\x14L\x15\x02\x15\0\x12\0\0PAR1", "is a Parquet file"),
    "zstd": (b"\x28\xb5\x2f\xfd\x04\x58hello", "zstd-compressed.*`zstd -d`"),
    "lz4": (b"\x04\x22\x4d\x18\x64\x40\xa7hello", "lz4-compressed.*`lz4 -d`"),
    "zip": (_archive("zip"), "a zip archive.*unpack"),
    "tar.gz": (_archive("tar"), "a tar archive.*unpack"),
    "7z": (b"7z\xbc\xaf\x27\x1c\0\x04", "a 7z archive"),
    "PDF": (b"%PDF-1.4\n1 0 obj\n<< /Type /Catalog >>\nendobj\n", "a PDF.*pdftotext"),
    "RTF": (b"{\\rtf1\\ansi Hello}", "an RTF document"),
    "Office": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(20), "an Office document"),
    "SQLite": (b"SQLite format 3\0" + bytes(20), "an SQLite database"),
    "GGUF": (b"GGUF\x03\0\0\0" + bytes(20), "a GGUF model"),
    "PNG": (b"\x89PNG\r\n\x1a\n" + bytes(20), "an image"),
    "safetensors": (save({"a": torch.ones(3)}), "NUL byte|control characters"),
    "UTF-16LE, no mark": (TEXT.encode("utf-16-le"), "iconv -f UTF-16LE"),
    "UTF-16BE, no mark": (TEXT.encode("utf-16-be"), "iconv -f UTF-16BE"),
    "plain letters in UTF-16LE, no mark": ("import os".encode("utf-16-le"), "iconv -f UTF-16LE"),
    "one NUL": (b"some text, and\0 more", "NUL byte at offset 14"),
    "UTF-16, cut off": (TEXT.encode("utf-16")[:-1], "mark of UTF-16-LE, but is not: byte 0x0a at offset 62"),
    "gzip, cut off": (gzip.compress(TEXT.encode(), mtime=0)[:-12], "gzip-compressed, and damaged or cut off"),
    "bzip2, cut off": (bz2.compress(TEXT.encode())[:-12], "bzip2-compressed, and damaged or cut off"),
    "xz, cut off": (lzma.compress(TEXT.encode())[:-12], "xz-compressed, and damaged or cut off"),
    "Latin-1": ("café au lait".encode("latin1"), "byte 0xe9 at offset 3; find out its encoding .*iconv -f ENCODING"),
    "binary": (b"abc\x01\x02\xff\xfe", "control characters"),
}
# fmt: on


def _through_every_door(raw, folder):
    """The text as `--text` and `--file`, `--contexts` and standard input read it."""
    file = folder / "a.anything"
    file.write_bytes(raw)
    yield lambda: load_text(file).documents[0]
    yield lambda: read_documents(file)[0]
    yield lambda: read_prompt(raw, "standard input")


@pytest.mark.parametrize("kind", READ)
def test_what_is_text_is_the_same_text_through_every_door(kind, tmp_path):
    assert [read() for read in _through_every_door(READ[kind], tmp_path)] == [TEXT] * 3


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_text_is_refused_by_its_name(kind, tmp_path):
    raw, words = REFUSED[kind]
    for read in _through_every_door(raw, tmp_path):
        with pytest.raises(DataError, match=words) as refusal:
            read()
        assert "LATIN1" not in str(refusal.value).upper()


def test_a_text_may_begin_with_the_letters_of_a_format(tmp_path):
    for text in ("PAR1 is a receptor.\n", "BZh1 is a name.\n", "GGUF files\n", "PK and more\n", "[1] A note\n", "{}\n"):
        assert [read() for read in _through_every_door(text.encode(), tmp_path)] == [text] * 3


RECORDS = [{"text": "first\r\ntext \u2028 é\n", "id": 1}, {"id": 2, "text": " \n"}, {"text": "second"}]
DOCUMENTS = ("first\ntext \u2028 é\n", "second")


def _lines(records, **options):
    return "".join(json.dumps(record, **options) + "\n" for record in records).encode()


@pytest.mark.parametrize(
    ("name", "raw"),
    {
        "a.jsonl": _lines(RECORDS),
        "b.JSONL": _lines(RECORDS, ensure_ascii=False).replace(b"\n", b"\r\n\r\n"),
        "c.ndjson": _lines(RECORDS).decode().encode("utf-16"),
        "d.jsonl.gz": gzip.compress(_lines(RECORDS), mtime=0),
        "e.json": json.dumps(RECORDS, indent=1).encode(),
        "f.json": _lines(RECORDS),
        "shard-0001": _lines(RECORDS),
        "g.gz": gzip.compress(_lines(RECORDS), mtime=0),
    }.items(),
)
def test_json_records_give_their_text(name, raw, tmp_path):
    (tmp_path / name).write_bytes(raw)
    assert load_text(tmp_path / name).documents == DOCUMENTS


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (_lines([{"text": "a"}, {"content": "b", "id": 1}]), r"a.jsonl, line 2 has no field `text`.*has content, id"),
        (_lines([{"text": ["a"]}]), "line 1 has no field `text` that is a string"),
        (_lines(["a"]), r"line 1 has no field `text`.*it is str"),
        (b'{"text": "a"}\n{"text": "b', "line 2 is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"text": "a \\ud800"}', "line 1: its text holds half a surrogate pair at character 2"),
        (_lines([{"text": " "}]), "holds only blanks"),
    ],
)
def test_records_without_text_are_refused_by_their_line(raw, words, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(raw)
    with pytest.raises(DataError, match=words):
        load_text(tmp_path / "a.jsonl")


def test_json_is_a_text_where_the_name_says_so(tmp_path):
    (tmp_path / "a.txt").write_text('{"a": 1}\n')
    assert load_text(tmp_path / "a.txt").documents == ('{"a": 1}\n',)


def test_parquet_is_read_where_its_library_is(tmp_path, monkeypatch):
    file = tmp_path / "a.bin"
    file.write_bytes(REFUSED["Parquet"][0])
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match=r"pip install pyarrow.*JSON lines"):
        load_text(file)
    monkeypatch.undo()
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    with pytest.raises(DataError, match="damaged"):
        load_text(file)
    columns = {key: [record.get(key) for record in RECORDS] for key in ("text", "id")}
    parquet.write_table(pyarrow.table(columns), file)
    assert load_text(file).documents == DOCUMENTS
    parquet.write_table(pyarrow.table({"content": ["a"]}), file)
    with pytest.raises(DataError, match=r"no column `text`.*it has content"):
        load_text(file)


def test_a_folder_gives_its_files_by_the_same_reader(tmp_path):
    (tmp_path / "a.txt").write_bytes(READ["UTF-16 of Windows"])
    (tmp_path / "b.md.gz").write_bytes(gzip.compress(b"second", mtime=0))
    assert load_text(tmp_path).documents == (TEXT, "second")


def test_a_folder_of_records_alone_gives_their_texts(tmp_path):
    (tmp_path / "part-1.jsonl.gz").write_bytes(gzip.compress(_lines(RECORDS), mtime=0))
    (tmp_path / "part-2.jsonl").write_bytes(_lines([{"text": "third"}]))
    (tmp_path / "info.json").write_text('{"rows": 4}')
    assert load_text(tmp_path).documents == (*DOCUMENTS, "third")
    (tmp_path / "read.md").write_text("a text")
    assert load_text(tmp_path).documents == ("a text",)


def test_a_prompt_may_end_inside_a_character_but_is_never_records():
    assert read_prompt(b"\xef\xbb\xbfone\r\ncaf\xc3", "standard input") == b"one\ncaf\xc3"
    lines = _lines(RECORDS).decode()
    assert read_prompt(lines.encode(), "standard input") == lines


def test_commands_take_standard_input_and_contexts_by_this_reader(tiny_folder, tmp_path):
    def written(data, *files):
        for name, content in zip("ab", files, strict=False):
            (tmp_path / name).write_bytes(content)
        over = ["--contexts", *(str(tmp_path / name) for name, _ in zip("ab", files, strict=False))] if files else []
        command = ["generate", str(tiny_folder), "-", *over, "--max-new-tokens", "6", "--temperature", "0"]
        done = CliRunner().invoke(cli, command, input=data)
        assert done.exit_code == 0, done.exception
        return done.stdout

    code = "import os\n\ndef f(x):\n    return"
    other = code.replace("\n", "\r\n").encode("utf-16")
    assert written(other) == written(code.encode())
    plain = written(b"def ", code.encode(), TEXT.encode())
    assert written(gzip.compress(b"def ", mtime=0), other, bz2.compress(TEXT.encode())) == plain
    records = _lines([{"text": code}, {"text": TEXT}])
    assert written(b"def ", records) == plain
