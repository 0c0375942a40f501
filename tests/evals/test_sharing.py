"""Runs that are killed, and runs that share a folder: every cell is done once, and nothing is lost."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

KILLS = 12
CELLS, ROWS = 30, 55

# A process loads once; its children measure, and are killed. A folder starts a child, the id of a child waits for it.
MEASURE = """
import os, sys, time
from pathlib import Path
from rich.console import Console
import torch
torch.set_num_threads(1)
import ropewalk as rw
from ropewalk.evals.data import load_text
from ropewalk.evals.models.local import LocalModel
from ropewalk.evals.protocols.perplexity_cell import cells
from ropewalk.evals.protocols.by_name import protocol
from ropewalk.evals.runs.result import Run
from ropewalk.evals.runs.measure import measure_all
from ropewalk.scaling import parse

model_folder, text = sys.argv[1:3]
model = rw.load(model_folder, compile=False)
plan = protocol("by-position", (100, 200, 300, 400, 500, 600))
subject = LocalModel(model)
todo = cells(subject, load_text(text), [parse(s) for s in ("none", "yarn:2", "ntk:2", "linear:2", "rerope:64")], plan)
print("ready", flush=True)
for line in map(str.strip, sys.stdin):
    if line.isdigit():
        print(os.waitstatus_to_exitcode(os.waitpid(int(line), 0)[1]), flush=True)
        continue
    folder = Path(line)
    folder.mkdir(exist_ok=True)
    child = os.fork()
    if child == 0:
        os._exit(len(measure_all(subject, todo, Run(folder), Console(quiet=True)).measured))
    print(child, flush=True)
"""


@pytest.fixture(scope="module")
def text_file(tmp_path_factory, held_out_texts):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(held_out_texts[0] * 3)
    return file


@pytest.fixture(scope="module")
def measurer(tiny_folder, text_file):
    """A process whose children measure the grid into the folders whose names it gets."""
    command = [sys.executable, "-c", MEASURE, str(tiny_folder), str(text_file)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        yield process


def ask(process, line):
    process.stdin.write(f"{line}\n")
    process.stdin.flush()
    return int(process.stdout.readline())


def measure(process, folder):
    """Let a child measure into a folder; the child."""
    return ask(process, folder)


def end(process, child):
    """How many cells the child has measured, or the signal that ended it, below zero."""
    return ask(process, child)


def lines(folder):
    file = Path(folder) / "results.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def timeless(row):
    return {k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second", "peak_memory_mb", "run_started")}


@pytest.mark.slow
def test_killed_at_any_moment_a_run_goes_on_and_no_row_is_lost_or_doubled(measurer, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert end(measurer, measure(measurer, whole)) == CELLS
    chance, kills, rows_so_far = random.Random(0), 0, 0
    for _ in range(KILLS):
        child, enough = measure(measurer, killed), rows_so_far + chance.randrange(5)
        while len(lines_of_whole_rows(killed)) < enough and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.001)
        time.sleep(chance.random() / 50)  # anywhere between two rows
        os.kill(child, signal.SIGKILL)  # one that has ended stays until it is waited for
        kills += end(measurer, child) == -signal.SIGKILL
        assert len(lines_of_whole_rows(killed)) >= rows_so_far
        rows_so_far = len(lines_of_whole_rows(killed))
    assert 0 <= end(measurer, measure(measurer, killed)) < CELLS
    assert kills > KILLS // 2  # the others came after its end
    expected, measured = ({row["key"]: timeless(row) for row in lines(folder)} for folder in (whole, killed))
    assert measured == expected
    assert len(lines(killed)) == len(expected) == ROWS
    for key in expected:
        a, b = (np.load(folder / "losses" / f"{key}.npy") for folder in (whole, killed))
        assert np.array_equal(a, b)


def lines_of_whole_rows(folder):
    file = folder / "results.jsonl"
    return file.read_bytes().split(b"\n")[:-1] if file.exists() else []


@pytest.mark.slow
def test_two_processes_share_one_grid(measurer, tmp_path):
    children = [measure(measurer, tmp_path / "both") for _ in range(2)]
    assert sum(end(measurer, child) for child in children) == CELLS
    keys = [row["key"] for row in lines(tmp_path / "both")]
    assert len(keys) == len(set(keys)) == ROWS
    assert list((tmp_path / "both" / ".claims").iterdir()) == []


@pytest.mark.slow
def test_accelerate_launch_shares_one_grid(tiny_folder, text_file, tmp_path):
    launch = "accelerate.commands.launch"
    command = [sys.executable, "-m", launch, "--cpu", "--num_processes", "2", "--num_machines", "1", "-m", "ropewalk"]
    command += ["ppl", str(tiny_folder), "--rope", "none", "--rope", "yarn:2", "--lengths", "128,256,512"]
    command += ["--target", "64", "--text", str(text_file), "--out", str(tmp_path / "run"), "--no-compile"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    keys = [row["key"] for row in lines(tmp_path / "run")]
    assert len(keys) == len(set(keys)) == 6
    assert done.stdout.count("report.html") == 1  # the first process alone speaks
