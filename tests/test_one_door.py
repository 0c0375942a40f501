"""`model.running` is the only way to what runs a model, and the way from there to a token is short."""

import re
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest

import ropewalk as rw
from ropewalk.engine.runners.cpu import runner as compiled_runner

SOURCE = Path(rw.__file__).parent
DOOR = "engine/scaled_model.py"
FRAMES = 9  # of ours between a call of `generate` and a step
CALLS = 60  # of our functions for one decoded token, beside those for each layer
MODULES = 19  # of ours that one decoded token passes through

TEXT = "def walk(top):\n    return [name for name in os.listdir(top)]\n"


def files():
    """Our sources by their path in the package, whose folders are links."""
    folders = {path.name: path.resolve() for path in SOURCE.iterdir() if path.is_dir()}
    return {
        f"{name}/{path.relative_to(folder)}": path.read_text(encoding="utf-8")
        for name, folder in folders.items()
        for path in folder.rglob("*.py")
    }


@pytest.mark.parametrize("private", [r"model\.(hf\.)?_?(runner|lock|prepare|slot)\b", r"\b_slot\.prepare\b"])
def test_the_runner_and_its_lock_are_reached_through_one_file(private):
    users = {name for name, text in files().items() if re.search(private, text)}
    assert DOOR in files()
    assert users <= {DOOR}, f"use `with model.running(length) as runner:` instead of {private}"


def test_threads_under_a_dynamic_scaler_get_their_own_tokens(tiny_folder):
    model = rw.load(tiny_folder, "dynamic-ntk", max_length=4096)
    params = rw.SamplingParams(max_new_tokens=12, temperature=0)
    prompts = [TEXT, TEXT * 12, TEXT * 25]
    alone = [model.generate(prompt, params).token_ids for prompt in prompts]
    together = {}

    def work(index):
        together[index] = [model.generate(prompts[index], params).token_ids for _ in range(3)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == {index: [ids] * 3 for index, ids in enumerate(alone)}


def ours(frame):
    return frame.f_globals.get("__name__", "").startswith("ropewalk.")


def stack():
    """Our functions that are running, the innermost first."""
    frames, frame = [], sys._getframe(1)
    while frame:
        if ours(frame):
            frames.append(frame.f_code.co_qualname)
        frame = frame.f_back
    return frames


@pytest.mark.parametrize("prompt", ["import nump", TEXT], ids=["the first token is healed", "a prompt of whole tokens"])
def test_few_frames_lie_between_generate_and_a_step(tiny_folder, monkeypatch, prompt):
    model = rw.load(tiny_folder, compile=True)
    stacks, share_threads = [], compiled_runner.share_threads
    monkeypatch.setattr(compiled_runner, "share_threads", lambda: stacks.append(stack()) or share_threads())
    model.generate(prompt, rw.SamplingParams(max_new_tokens=3, temperature=0))
    first, *_, last = stacks
    assert len(first) <= FRAMES, first
    assert len(last) <= FRAMES / 2, last


def test_a_token_takes_few_calls_in_few_modules(tiny_folder):
    model = rw.load(tiny_folder, compile=True)
    stream = model.stream(TEXT, rw.SamplingParams(max_new_tokens=8, temperature=0))
    next(stream)
    next(stream)
    calls, modules = Counter(), set()

    def count(frame, event, _):
        if event == "call" and ours(frame):
            if "<" not in frame.f_code.co_name:
                calls[frame.f_code.co_qualname] += 1
            if frame.f_code.co_filename == sys.modules[frame.f_globals["__name__"]].__file__:  # no generated __init__
                modules.add(frame.f_globals["__name__"])

    sys.setprofile(count)
    try:
        next(stream)
    finally:
        sys.setprofile(None)
    layers = model.hf.config.num_hidden_layers
    once = sum(n for n in calls.values() if n < layers)
    assert once <= CALLS, calls
    assert len(modules) <= MODULES, "\n".join(sorted(modules))
