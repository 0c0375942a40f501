"""The cache folder, and writing files and folders that are either complete or absent."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import platformdirs
from filelock import FileLock, Timeout

from ..errors import AssetError

__all__ = ["cache_dir", "fill_once", "make_readable", "make_room", "new_folder", "write_atomic"]

_MB = 1_000_000
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG}


def cache_dir() -> Path:
    """The cache folder: ROPEWALK_CACHE, or the user's cache folder for ropewalk."""
    chosen = os.environ.get("ROPEWALK_CACHE")
    return Path(chosen).expanduser().absolute() if chosen else Path(platformdirs.user_cache_dir("ropewalk"))


@contextlib.contextmanager
def fill_once(target: Path, *, needed: int, what: str) -> Iterator[Path | None]:
    """An empty folder that is renamed to `target` when the block ends without an error.

    After an error, a Ctrl-C or a kill there is nothing at `target`. The next process removes what a killed one left.
    The folder's parent is scratch space on the same disk and is removed, too. One process at a time enters the block;
    it gets None if another has filled `target` in the meantime.

    Raises:
        AssetError: less than `needed` bytes are free, or the disk cannot be written.
    """
    messages = (
        f"{what}: cannot write to the cache folder {target.parent}",
        "; set ROPEWALK_CACHE to a folder that can be written",
    )
    with contextlib.ExitStack() as stack:
        with _raised_as_asset_error(*messages):
            target.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_locked(target.with_name(f".{target.name}.lock"), what))
            exists = target.exists()
            if not exists:
                for leftover in target.parent.glob(f".{target.name}-*.partial"):
                    shutil.rmtree(leftover, ignore_errors=True)
                _require_space(target.parent, needed, what, "set ROPEWALK_CACHE to a folder on a larger disk")
        yield None if exists else stack.enter_context(_renamed_at_end(target, *messages))


@contextlib.contextmanager
def new_folder(target: Path, *, needed: int) -> Iterator[Path]:
    """An empty folder that is renamed to `target` when the block ends without an error, and removed after one.

    Raises:
        AssetError: `target` exists and is not an empty folder, less than `needed` bytes are free, or the disk cannot
            be written.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise AssetError(f"{target} exists and is not an empty folder; choose another name, or delete it first")
    make_room(target, needed)
    with _renamed_at_end(target, f"{target}: cannot be written") as work:
        yield work


def make_room(target: Path, needed: int) -> None:
    """Make the folder in which `target` will be written.

    Raises:
        AssetError: it cannot be made, or less than `needed` bytes are free there.
    """
    with _raised_as_asset_error(f"{target}: cannot be written"):
        target.parent.mkdir(parents=True, exist_ok=True)
        _require_space(target.parent, needed, str(target), "choose a folder on a larger disk")


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that it is at every moment either the old one or the complete new one. Makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def make_readable(*files: Path) -> None:
    """Give files the permissions of a new file: safetensors makes them readable for their owner only."""
    for file in files:
        plain = file.with_name(f"{file.name}.new")
        plain.touch()  # reading the umask would change it for a moment, in all threads
        try:
            file.chmod(file.stat().st_mode | plain.stat().st_mode)
        finally:
            plain.unlink()


@contextlib.contextmanager
def _renamed_at_end(target: Path, failed: str, remedy: str = "") -> Iterator[Path]:
    """A folder in scratch space beside `target` that is renamed to it at the end.

    Args:
        failed, remedy: as for `_raised_as_asset_error`.
    """
    with contextlib.ExitStack() as stack:
        with _raised_as_asset_error(failed, remedy):
            scratch = tempfile.TemporaryDirectory(
                prefix=f".{target.name}-", suffix=".partial", dir=target.parent, ignore_cleanup_errors=True
            )
            work = Path(stack.enter_context(scratch)) / "result"
            work.mkdir()
        with _raised_as_asset_error(failed, remedy, within=work.parent):
            yield work
        with _raised_as_asset_error(failed, remedy):
            make_readable(*(file for file in work.rglob("*") if file.is_file()))
            work.replace(target)


@contextlib.contextmanager
def _raised_as_asset_error(failed: str, remedy: str = "", *, within: Path | None = None) -> Iterator[None]:
    """Raise an OSError as an AssetError that says what failed, why, and what to do.

    Args:
        within: a folder, for a block that does more than write to it. An error that names no file in it passes
            unchanged, unless it is that of a full or broken disk.
    """
    try:
        yield
    except OSError as error:
        named = within in Path(str(error.filename)).absolute().parents
        if within is not None and not named and error.errno not in _DISK_ERRORS:
            raise
        raise AssetError(f"{failed} ({error.strerror or error}){remedy}") from error


@contextlib.contextmanager
def _locked(lock_file: Path, what: str) -> Iterator[None]:
    lock = FileLock(lock_file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        sys.stderr.write(f"{what}: waiting for another process that is preparing it\n")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _require_space(folder: Path, needed: int, what: str, remedy: str) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise AssetError(
            f"{what} needs {-(-needed // _MB)} MB of disk space in {folder}, which has {free // _MB} MB free; "
            f"make room, or {remedy}"
        )
