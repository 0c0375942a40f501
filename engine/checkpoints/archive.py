"""Archives of a Python package index: downloaded with pip, checked against a pinned sha256, extracted."""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ...errors import AssetError
from ..storage import cache_dir

__all__ = ["Archive", "append", "extract", "fetch_archive", "file_sha256"]


_CHUNK = 1 << 20  # bytes that are copied at a time


@dataclass(frozen=True, kw_only=True)
class Archive:
    """One pinned file: a wheel or a source archive (`.tar.gz`) of `size` bytes."""

    package: str
    version: str
    file: str
    sha256: str
    size: int

    @property
    def requirement(self) -> str:
        """The pin as pip writes it."""
        return f"{self.package}=={self.version}"


def fetch_archive(archive: Archive, scratch: Path, *, what: str, quiet: bool) -> Path:
    """The path of the archive, with its sha256 checked: a file of the user in CACHE/downloads, or a download in
    `scratch`.

    Args:
        what: name of the asset, for the progress bar and for errors.
        quiet: show no progress bar, even on a terminal.

    Raises:
        AssetError: no network, no pip, or the file is not the pinned one.
    """
    return _user_file(archive) or _download(archive, scratch, what=what, quiet=quiet)


def _user_file(archive: Archive) -> Path | None:
    """The file that the user put into CACHE/downloads, if there is one. It stays there."""
    file = cache_dir() / "downloads" / archive.file
    if not file.is_file():
        return None
    try:
        sha256 = file_sha256(file)
    except OSError as error:
        raise AssetError(f"{file}: cannot be read ({error.strerror or error})") from error
    if sha256 != archive.sha256:
        raise AssetError(
            f"{file} is not the pinned file: its sha256 is {sha256}, expected {archive.sha256}; "
            f"replace it by {archive.file} of {archive.requirement}, or delete it to download again"
        )
    return file


def _download(archive: Archive, scratch: Path, *, what: str, quiet: bool) -> Path:
    file = scratch / "archive" / archive.file
    temporary = scratch / "pip"
    temporary.mkdir()
    # To read the metadata of a source archive, pip runs its setup.py. With a hash in the requirement, it compares the
    # hash before that.
    requirement = scratch / "requirement.txt"
    requirement.write_text(f"{archive.requirement} --hash=sha256:{archive.sha256}\n", encoding="utf-8")
    option = "--only-binary" if archive.file.endswith(".whl") else "--no-binary"
    command = [
        *_pip(),
        *("download", "--no-deps", "--no-cache-dir", "--no-input", "--disable-pip-version-check"),
        *("--progress-bar", "off", option, archive.package, "--require-hashes"),
        *("--dest", str(file.parent), "--requirement", str(requirement)),
    ]
    log = scratch / "pip.log"
    with log.open("wb") as output, _bar(what, archive.size, quiet=quiet) as show:
        code = _run(command, output, temporary, lambda: show(_size_so_far(scratch, archive.file)))
    messages = log.read_text(encoding="utf-8", errors="replace")
    if mismatch := re.search(r"^\s*Got\s+([0-9a-f]{64})\s*$", messages, re.MULTILINE):
        raise _damaged(archive, mismatch[1], what)
    if code != 0 or not file.is_file():
        raise AssetError(
            f"{what}: pip could not download {archive.requirement} ({_reason(messages)}). "
            f"Without a network, {_by_hand(archive)}"
        )
    if (sha256 := file_sha256(file)) != archive.sha256:
        raise _damaged(archive, sha256, what)
    return file


def _pip() -> list[str]:
    return [sys.executable, "-m", "pip"]


def _run(command: list[str], output: IO[bytes], temporary: Path, tick: Callable[[], None]) -> int:
    """Run pip with `temporary` as its temporary folder, and call `tick` ten times a second. Returns the exit code."""
    environment = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(temporary))
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment
    )
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(timeout=0.1)
            tick()
    finally:
        if process.poll() is None:  # Ctrl-C: pip must not write into a folder that is being removed
            process.kill()
            process.wait()


def _size_so_far(scratch: Path, name: str) -> int:
    """Bytes of the file that pip is downloading. Files may appear and vanish meanwhile."""
    sizes = [0]
    for folder, _, names in os.walk(scratch):
        if name in names:
            with contextlib.suppress(FileNotFoundError):
                sizes.append((Path(folder) / name).stat().st_size)
    return max(sizes)


def _reason(messages: str) -> str:
    """The reason of a failure, from pip's messages."""
    if "No module named pip" in messages:
        return "this Python has no pip; `python -m ensurepip` adds it"
    if re.search(r"NewConnectionError|NameResolutionError|ConnectTimeout|Max retries exceeded", messages):
        return "no connection to the package index"
    errors = re.findall(r"^ *error: *(.+)$", messages, re.MULTILINE | re.IGNORECASE)
    return (errors or messages.strip().splitlines() or ["pip gave no message"])[-1]


def _damaged(archive: Archive, sha256: str, what: str) -> AssetError:
    return AssetError(
        f"{what}: the downloaded {archive.file} is damaged or not the pinned file: its sha256 is {sha256}, "
        f"expected {archive.sha256}; it was deleted, so run again, or {_by_hand(archive)}"
    )


def _by_hand(archive: Archive) -> str:
    return (
        f"get the file on another machine with `pip download --no-deps {archive.requirement}`, "
        f"put {archive.file} into {cache_dir() / 'downloads'} and run again"
    )


def file_sha256(file: Path) -> str:
    """The sha256 of a file, 64 hex digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def extract(file: Path, root: str, pattern: str, out: Path) -> None:
    """Copy files of an archive into the folder `out`.

    Args:
        file: an archive that `fetch_archive` returned.
        root: the folder in the archive from which files are copied, with a slash at its end.
        pattern: an fnmatch pattern for the paths below `root`.
    """
    for relative, stream in _matching(file, root, pattern):
        target = out / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as copy:
            shutil.copyfileobj(stream, copy, _CHUNK)


def append(file: Path, root: str, pattern: str, target: Path) -> None:
    """Append files of an archive, in its order, to the file `target`.

    Args:
        file, root, pattern: as for `extract`.
    """
    with target.open("ab") as whole:
        for _, stream in _matching(file, root, pattern):
            shutil.copyfileobj(stream, whole, _CHUNK)


def _matching(file: Path, root: str, pattern: str) -> Iterator[tuple[str, IO[bytes]]]:
    """The path below `root` and the content of each file that `extract` copies."""
    count = 0
    for name, stream in _members(file):
        relative = name.removeprefix(root)
        if name.startswith(root) and fnmatch.fnmatchcase(relative, pattern):
            yield relative, stream
            count += 1
    assert count, f"{file.name} holds no {root}{pattern}"


def _members(file: Path) -> Iterator[tuple[str, IO[bytes]]]:
    if file.suffix == ".whl":
        with zipfile.ZipFile(file) as wheel:
            for info in wheel.infolist():
                if not info.is_dir():
                    with wheel.open(info) as stream:
                        yield info.filename, stream
    else:
        with tarfile.open(file) as source:
            for member in source:
                if (extracted := source.extractfile(member)) is not None:
                    yield member.name, extracted


@contextlib.contextmanager
def _bar(what: str, total: int, *, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar with the time left, if stderr is a terminal. Yields a function that takes the bytes so far."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as progress:
        task = progress.add_task(f"downloading {what}", total=total)
        yield lambda size: progress.update(task, completed=size)
