"""Texts to measure on: built-in texts, and files or folders of the user."""

from __future__ import annotations

import difflib
import hashlib
import json
import reprlib
import sysconfig
import tokenize
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..engine.checkpoints import assets
from ..engine.texts import COMPRESSED_SUFFIXES, RECORD_SUFFIXES, read_documents
from ..errors import DataError, did_you_mean, first_line
from ..tokenizer_tools.encode import texts_ids as _encode

__all__ = ["TEXTS", "TEXT_SUFFIXES", "Text", "load_text", "tokenize_documents"]

TEXTS: dict[str, str] = {
    "kjv": assets.ASSETS["kjv"].description,
    "shakespeare": assets.ASSETS["shakespeare"].description,
    "pydoc": "Python's own help topics, one document of 110k tokens; differs between Python versions",
    "stdlib": "the standard library's sources, one document of 12 MB; differs between Python versions",
    "code": "16 of the standard library's modules, one document of 900 kB; differs between Python versions",
    "chinese": "a story in Chinese, one document of 1600 characters",
}
"""The built-in texts, each with a description of one line."""

_PROSE = (".txt", ".md", ".rst", ".tex", ".html")
_CODE = (".py", ".c", ".h", ".cpp", ".hpp", ".java", ".js", ".ts", ".go", ".rs", ".rb", ".sh", ".sql")
TEXT_SUFFIXES = frozenset(_PROSE + _CODE)
"""Suffixes of the files that are read from a folder. Compressed files (`.txt.gz`) are read too."""

_READ, _RECORDS = (
    tuple(suffix + compressed for suffix in sorted(suffixes) for compressed in ("", *COMPRESSED_SUFFIXES))
    for suffixes in (TEXT_SUFFIXES, RECORD_SUFFIXES)
)

_NOT_THE_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_CORE = (
    *("argparse.py", "ast.py", "configparser.py", "csv.py", "dataclasses.py", "difflib.py"),
    *("http/client.py", "http/server.py", "json/decoder.py", "logging/__init__.py", "random.py", "shutil.py"),
    *("socketserver.py", "tarfile.py", "textwrap.py", "urllib/request.py"),
)
_CHARACTERS = 6
"""First estimate of the characters of a token, on the high side; English has about 4.2."""

_MARGIN = 64
"""Tokens at the end of a cut text that may differ from the tokens of the whole text.

It is far more than any tokenizer looks ahead.
"""


@dataclass(frozen=True, kw_only=True)
class Text:
    """Documents to measure on.

    Args:
        name: the name or path that the user gave.
        documents: in a fixed order. None of them is empty.
        sha256: of the documents in UTF-8, each after its length in bytes (8 bytes, big-endian).
    """

    name: str
    documents: tuple[str, ...]
    sha256: str


def load_text(name_or_path: str | Path) -> Text:
    """Load a built-in text, a file or a folder.

    The built-in texts: `kjv` is one document, in which each chapter is a line such as "Genesis 1"
    and a paragraph of its verses, joined by spaces. `shakespeare` has the plays as Markdown, sorted
    by path. `pydoc` has all help topics, sorted by name. `stdlib` has all modules without tests,
    sorted by path, each after a comment with its path. `code` has some of these modules. `chinese`
    is a story.

    A file is one document, in UTF-8, or in UTF-16 or UTF-32 with a byte order mark. Line ends
    become "\\n". JSON lines (`.jsonl`) and Parquet files (with pyarrow) give the field `text` of
    each record. gzip, bzip2 and xz are decompressed. Other formats are refused with their name. A
    folder gives the documents of all files at any depth whose suffix is in TEXT_SUFFIXES, sorted by
    path. A folder without such files gives the records of its `.jsonl` and `.parquet` files. Hidden
    files and blank documents are left out. To load a file that has the name of a built-in text,
    write `./kjv`.

    Raises:
        DataError: there is no such name or path, or it holds no text.
        AssetError: a built-in text cannot be downloaded.
    """
    name = str(name_or_path)
    if name in _BUILT_IN:
        documents = _BUILT_IN[name]()
    else:
        try:
            documents = _of_path(name)
        except (OSError, RuntimeError) as error:  # too long for a path, unreadable, or ~ of an unknown user
            why = getattr(error, "strerror", None) or error
            raise DataError(
                f"{reprlib.repr(name)} cannot be read ({why}); give the name of a built-in text or the path of a file"
            ) from None
    if not any(document.strip() for document in documents):
        raise DataError(f"{name} holds only blanks; give a text with words")
    return Text(name=name, documents=documents, sha256=_digest(documents))


def tokenize_documents(text: Text, tokenizer: Any, *, limit_tokens: int | None = None) -> list[list[int]]:
    """Token ids of every document, without special tokens. They stay in memory as long as the
    tokenizer.

    The name of a special token in the text (`<|endoftext|>`) is encoded as ordinary characters.

    Args:
        tokenizer: a transformers tokenizer.
        limit_tokens: the number of tokens to return from the beginning of each document. Only the
            text that they need is encoded; the ids are the same as those of the whole text, cut
            off.
    """
    cache = _TOKENS.setdefault(tokenizer, {})
    key = (text, len(tokenizer), limit_tokens)
    if key not in cache:
        if limit_tokens is None:
            cache[key] = _encode(list(text.documents), tokenizer)
        else:
            cache[key] = [_encode_beginning(document, tokenizer, limit_tokens) for document in text.documents]
    return [list(ids) for ids in cache[key]]


_TOKENS: weakref.WeakKeyDictionary[Any, dict[Any, list[list[int]]]] = weakref.WeakKeyDictionary()


def _encode_beginning(document: str, tokenizer: Any, limit: int) -> list[int]:
    characters = _CHARACTERS * (limit + _MARGIN)
    while characters < len(document):
        ids = _encode([document[:characters]], tokenizer)[0]
        if len(ids) >= limit + _MARGIN:
            return ids[:limit]
        characters *= 2
    return _encode([document], tokenizer)[0][:limit]


def _kjv() -> tuple[str, ...]:
    chapters: dict[str, list[str]] = {}
    file = assets.fetch("kjv")
    try:
        for line in file.read_text(encoding="utf-8").splitlines():
            verse = json.loads(line)
            chapters.setdefault(f"{verse['book']} {verse['chapter']}", []).append(verse["text"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{file} is damaged ({first_line(error)}); delete its folder to download it again") from error
    return ("".join(f"{heading}\n{' '.join(verses)}\n\n" for heading, verses in chapters.items()),)


def _shakespeare() -> tuple[str, ...]:
    return _folder(assets.fetch("shakespeare"))


def _pydoc() -> tuple[str, ...]:
    from pydoc_data.topics import topics

    return ("\n\n".join(topics[name].strip() for name in sorted(topics)) + "\n",)


def _stdlib() -> tuple[str, ...]:
    root = Path(sysconfig.get_path("stdlib"))
    below = (file.relative_to(root) for file in _sorted_files(root, (".py",)))
    # _sysconfigdata describes how this Python was built; it is no part of the library
    modules = (
        name for name in below if _NOT_THE_LIBRARY.isdisjoint(name.parts) and not name.name.startswith("_sysconfigdata")
    )
    return _modules(modules)


def _code() -> tuple[str, ...]:
    root = Path(sysconfig.get_path("stdlib"))
    return _modules(Path(name) for name in _CORE if (root / name).is_file())


def _modules(names: Iterable[Path]) -> tuple[str, ...]:
    root = Path(sysconfig.get_path("stdlib"))
    modules = []
    for name in names:
        with tokenize.open(root / name) as source:  # with the encoding that the file declares
            modules.append(f"# {name.as_posix()}\n{source.read()}")
    if not modules:
        raise DataError(f"stdlib: this Python has no sources in {root}; give a folder with text instead")
    return ("\n\n".join(modules),)


def _chinese() -> tuple[str, ...]:
    return (Path(__file__).with_name("chinese.txt").read_text(encoding="utf-8"),)


_BUILT_IN: dict[str, Callable[[], tuple[str, ...]]] = {
    "kjv": _kjv,
    "shakespeare": _shakespeare,
    "pydoc": _pydoc,
    "stdlib": _stdlib,
    "code": _code,
    "chinese": _chinese,
}


def _of_path(name: str) -> tuple[str, ...]:
    path = Path(name).expanduser()
    if name and path.is_dir():
        return _folder(path)
    if name and path.is_file():
        return _not_blank(read_documents(path))
    raise DataError(f"there is no text or file {name!r}.{_nearest(name, path)}")


def _folder(folder: Path) -> tuple[str, ...]:
    files = _sorted_files(folder, _READ) or _sorted_files(folder, _RECORDS)
    if not files:
        suffixes = " ".join([*sorted(TEXT_SUFFIXES), *RECORD_SUFFIXES])
        raise DataError(f"{folder} holds no text file; these suffixes are read: {suffixes}, also compressed")
    return _not_blank(document for file in files for document in read_documents(file))


def _not_blank(documents: Iterable[str]) -> tuple[str, ...]:
    return tuple(document for document in documents if document.strip())


def _sorted_files(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Files below `folder` whose names end in one of `suffixes`, without hidden ones.

    They are sorted by their path with slashes, which is the same order on every system.
    """
    files = [
        file
        for file in folder.rglob("*")
        if file.name.lower().endswith(suffixes)
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
        and file.is_file()
    ]
    return sorted(files, key=lambda file: file.relative_to(folder).as_posix())


def _nearest(name: str, path: Path) -> str:
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    if path.name not in TEXTS and (close := difflib.get_close_matches(path.name, siblings, n=1, cutoff=0.6)):
        return f" Did you mean {str(path.with_name(close[0]))!r}?"
    return did_you_mean(name, TEXTS)


def _digest(documents: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for document in documents:
        encoded = document.encode("utf-8")
        digest.update(len(encoded).to_bytes(8, "big") + encoded)
    return digest.hexdigest()
