"""Disks that are full or cannot be written, files damaged by hand: said in a sentence, and nothing finished is lost."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

import ropewalk as rw
from ropewalk.engine.checkpoints import assets
from ropewalk.engine.storage import cache_dir
from ropewalk.evals.data import load_text
from ropewalk.evals.runs.result import Run

# A disk with room for so many bytes a file: writes beyond it fail as on a full one.
FULL = """
import resource, signal, sys
from pathlib import Path
from ropewalk.errors import DataError
from ropewalk.evals.runs.result import Run
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
run = Run(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
for i in range(1000):
    try:
        run.add({"cell": i}, {"loss": 1.0})
    except DataError as error:
        print(i, error)
        break
"""


def test_a_disk_that_fills_up_in_the_middle_of_a_run(tmp_path):
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    count, _, message = done.stdout.partition(" ")
    assert "cannot be written" in message
    assert "free some space" in message and "the same command continues" in message
    assert (tmp_path / "results.jsonl").stat().st_size == 3000  # a line is torn
    run = Run(tmp_path)
    assert [row["cell"] for row in run.rows] == list(range(int(count)))
    run.add({"cell": int(count)}, {"loss": 1.0})
    assert [row["cell"] for row in Run(tmp_path).rows] == list(range(int(count) + 1))


def test_a_disk_that_is_full_for_the_losses(tmp_path, monkeypatch):
    run = Run(tmp_path)
    run.add({"cell": 0}, {"loss": 1.0}, np.ones(3))
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(rw.DataError, match="No space left on device"):
        run.add({"cell": 1}, {"loss": 1.0}, np.ones(3))
    with pytest.raises(rw.DataError, match="No space left on device"):
        run.write_environment()
    monkeypatch.undo()
    assert [row["cell"] for row in Run(tmp_path).rows] == [0]
    assert len(list((tmp_path / "losses").iterdir())) == 1


def test_a_folder_that_cannot_be_made_or_written(tmp_path, monkeypatch):
    with pytest.raises(rw.DataError, match=r"cannot be written.*Nothing was stored"):
        Run(tmp_path.__class__("/proc/nothing/run"))
    run = Run(tmp_path)
    refusal = PermissionError(13, "Permission denied")
    monkeypatch.setattr("pathlib.Path.open", lambda *_, **__: (_ for _ in ()).throw(refusal))
    with pytest.raises(rw.DataError, match=r"\(Permission denied\); allow writing to it, or .*Nothing was stored$"):
        run.add({"cell": 0}, {"loss": 1.0})
    monkeypatch.undo()
    monkeypatch.setattr("pathlib.Path.mkdir", lambda *_, **__: (_ for _ in ()).throw(refusal))
    with pytest.raises(rw.DataError, match=r"cannot be written \(Permission denied\)"), run.claim("a"):
        pass


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ROPEWALK_CACHE", str(tmp_path / "cache"))
    return cache_dir()


@pytest.mark.parametrize("harm", ["cut", "swapped", "gone"])
def test_a_model_in_the_cache_that_was_damaged_by_hand(tiny_folder, cache, harm):
    """It is said, and that deleting the folder makes it anew."""
    folder = shutil.copytree(tiny_folder, cache / "gguf-tiny-0123456789ab")
    weights = folder / "model.safetensors"
    if harm == "cut":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif harm == "swapped":
        config = folder / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"intermediate_size": 512}))
    else:
        weights.unlink()
    with pytest.raises(rw.AssetError, match="delete the folder, and run again to convert the model again"):
        rw.load(folder)


def test_a_text_in_the_cache_that_was_damaged_by_hand(cache):
    folder = assets.ASSETS["kjv"].folder
    folder.mkdir(parents=True)
    (folder / assets.ASSETS["kjv"].entry).write_text('{"book": "Genesis", "chap')
    with pytest.raises(rw.DataError, match=r"kjv\.jsonl is damaged .*delete its folder to download it again"):
        load_text("kjv")
    (folder / assets.ASSETS["kjv"].entry).unlink()
    with pytest.raises(rw.DataError, match=r"kjv\.jsonl is damaged"):
        load_text("kjv")
