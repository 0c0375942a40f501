"""The run folder: what survives a kill, what is refused, what is found again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ropewalk.engine.storage import write_atomic
from ropewalk.errors import DataError
from ropewalk.evals.runs.result import Run, recipe_key

RECIPE = {"task": "ppl", "rope": "yarn:4", "context": 8192, "target": None}


def test_row_and_losses_come_back(tmp_path: Path) -> None:
    losses = np.array([1.5, 2.25, 0.1], dtype=np.float32)
    row = Run(tmp_path / "a").add(RECIPE, {"loss": 1.28, "versions": {"torch": "2"}}, losses)
    again = Run(tmp_path / "a")
    assert again.rows == [row]
    assert row == {"key": recipe_key(RECIPE), **RECIPE, "loss": 1.28, "versions": {"torch": "2"}}
    stored = again.losses(row)
    assert stored is not None
    assert stored.dtype == np.float32
    np.testing.assert_array_equal(stored, losses)


def test_key_is_the_hash_of_canonical_json() -> None:
    # printf '{"context":8192,"target":null}' | sha256sum
    assert recipe_key({"target": None, "context": 8192}) == "b1cf8d7d7c24"
    assert recipe_key({"a": 1, "b": "x"}) == recipe_key({"b": "x", "a": 1})
    assert len(recipe_key(RECIPE)) == 12


def test_other_recipe_has_another_key() -> None:
    assert recipe_key(RECIPE) != recipe_key(RECIPE | {"context": 8193})
    assert recipe_key(RECIPE) != recipe_key(RECIPE | {"seed": None})


def test_find_needs_exactly_this_recipe(tmp_path: Path) -> None:
    run = Run(tmp_path)
    row = run.add(RECIPE, {"loss": 1.0})
    assert run.find(dict(reversed(RECIPE.items()))) == row
    assert run.find(RECIPE | {"rope": "none"}) is None


def test_numpy_values_are_stored_as_json_numbers(tmp_path: Path) -> None:
    row = Run(tmp_path).add({"context": np.int64(8)}, {"loss": np.float32(0.5), "loss_low": float("nan")})
    assert row["context"] == 8
    assert row["loss"] == 0.5
    assert row["loss_low"] is None
    assert json.loads((tmp_path / "results.jsonl").read_text()) == row
    assert recipe_key({"context": np.int64(8)}) == recipe_key({"context": 8})


def test_half_a_surrogate_pair_as_of_a_folders_name_comes_back(tmp_path: Path) -> None:
    Run(tmp_path).add({"model": os.fsdecode(b"tiny\xff")}, {"loss": 0.5})
    assert [row["model"] for row in Run(tmp_path).rows] == ["tiny\udcff"]


@pytest.mark.parametrize("cut", [1, 20, -3])
def test_torn_last_line_is_dropped_and_repaired(tmp_path: Path, cut: int) -> None:
    first = Run(tmp_path).add(RECIPE, {"loss": 1.0})
    file = tmp_path / "results.jsonl"
    whole = file.read_bytes()
    torn = json.dumps({"key": "x" * 12, "loss": 2.0}).encode()[:cut]
    file.write_bytes(whole + torn)
    run = Run(tmp_path)
    assert run.rows == [first]
    second = run.add(RECIPE | {"rope": "none"}, {"loss": 3.0})
    assert Run(tmp_path).rows == [first, second]
    assert file.read_bytes().startswith(whole)


def test_last_line_without_its_newline_is_kept(tmp_path: Path) -> None:
    first = Run(tmp_path).add(RECIPE, {"loss": 1.0})
    file = tmp_path / "results.jsonl"
    file.write_bytes(file.read_bytes().rstrip(b"\n"))
    run = Run(tmp_path)
    second = run.add(RECIPE | {"rope": "none"}, {"loss": 3.0})
    assert Run(tmp_path).rows == [first, second]


@pytest.mark.parametrize("damaged", [b"{not json", b"[1, 2]", b'{"loss": 1}', b"\xff\xfe"])
def test_damaged_line_in_the_middle_is_named(tmp_path: Path, damaged: bytes) -> None:
    Run(tmp_path).add(RECIPE, {"loss": 1.0})
    file = tmp_path / "results.jsonl"
    line = file.read_bytes()
    file.write_bytes(line + damaged + b"\n" + line)
    with pytest.raises(DataError, match=r"results\.jsonl, line 2 is damaged"):
        Run(tmp_path)


def test_losses_are_stored_before_the_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path)

    def killed(path: Path, data: bytes) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ropewalk.evals.runs.result.write_atomic", killed)
    with pytest.raises(KeyboardInterrupt):
        run.add(RECIPE, {"loss": 1.0}, np.ones(3, np.float32))
    assert Run(tmp_path).rows == []  # no row that promises losses which are not there


def test_measured_again_counts_as_measured_last(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.add(RECIPE, {"loss": None, "reason": "out of memory"})
    run.add(RECIPE | {"rope": "none"}, {"loss": 3.0})
    run.add(RECIPE, {"loss": 1.0})
    assert [row["loss"] for row in run.rows] == [1.0, 3.0]
    assert Run(tmp_path).rows == run.rows


def test_losses_absent_or_damaged(tmp_path: Path) -> None:
    run = Run(tmp_path)
    row = run.add(RECIPE, {"loss": 1.0})
    assert run.losses(row) is None
    row = run.add(RECIPE, {"loss": 1.0}, np.ones(3, np.float32))
    (tmp_path / "losses" / f"{row['key']}.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(DataError, match="cannot be read"):
        run.losses(row)


WRITER = """
import sys
from pathlib import Path
from ropewalk.evals.runs.result import Run
run = Run(Path(sys.argv[1]))
try:
    run.add({"rope": "other"}, {"loss": 2.0})
except Exception as error:
    print(type(error).__name__, error)
else:
    print("added", len(run.rows))
"""


def other_process(folder: Path) -> str:
    done = subprocess.run([sys.executable, "-c", WRITER, str(folder)], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_processes_share_a_folder(tmp_path: Path) -> None:
    early = Run(tmp_path)
    assert other_process(tmp_path) == "added 1"
    assert early.rows == []
    early.add(RECIPE, {"loss": 1.0})
    assert [row["rope"] for row in early.rows] == ["other", "yarn:4"]
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2


CLAIMER = """
import sys, time
from pathlib import Path
from ropewalk.evals.runs.result import Run
with Run(Path(sys.argv[1])).claim("cell") as is_ours:
    print(is_ours, flush=True)
    time.sleep(float(sys.argv[2]))
"""


def claimer(folder: Path, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CLAIMER, str(folder), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_a_claim_is_held_by_one_process_and_let_go_when_it_is_killed(tmp_path: Path) -> None:
    run = Run(tmp_path)
    holder = claimer(tmp_path, 60)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "True\n"
    with run.claim("cell") as is_ours:
        assert not is_ours
    with run.claim("another cell") as is_ours:
        assert is_ours
    holder.kill()
    holder.wait()
    with run.claim("cell") as is_ours:
        assert is_ours
        other = claimer(tmp_path, 0)
        assert other.communicate()[0] == "False\n"
    assert list((tmp_path / ".claims").iterdir()) == []


def test_a_claim_sees_what_was_added_before_it(tmp_path: Path) -> None:
    run = Run(tmp_path)
    other_process(tmp_path)
    with run.claim("cell"):
        assert run.find({"rope": "other"}) is not None


def test_two_runs_in_one_process_share_the_folder(tmp_path: Path) -> None:
    Run(tmp_path).add(RECIPE, {"loss": 1.0})
    first, second = Run(tmp_path), Run(tmp_path)
    first.add(RECIPE | {"rope": "a"}, {"loss": 1.0})
    second.add(RECIPE | {"rope": "b"}, {"loss": 1.0})
    assert len(Run(tmp_path).rows) == 3


def test_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    for folder in (tmp_path / "a", tmp_path / "a" / "b"):
        with pytest.raises(DataError, match="give a folder"):
            Run(folder)


def test_atomic_write_leaves_the_old_file_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.json"
    write_atomic(file, b"old")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        write_atomic(file, b"new")
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


def test_environment_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/some/where/ropewalk/__main__.py", "ppl", "a model"])
    found = Run(tmp_path).write_environment()
    assert json.loads((tmp_path / "env.json").read_text()) == found
    assert found["command"] == "ropewalk ppl 'a model'"
    for name in ("ropewalk", "torch", "transformers", "python", "platform", "cpu", "torch_threads", "device"):
        assert found[name]
