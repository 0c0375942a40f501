"""A model that is split over two processes, as torchrun starts them, computes what the whole model does."""

import json
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
from click.testing import CliRunner
from prepared import python

import ropewalk as rw
from ropewalk.cli.main import cli

SCRIPT = """
import json, os, sys
import ropewalk as rw

folder, out, ropes, *command = sys.argv[1:]
results = {}
for rope in ropes.split(";"):
    model = rw.load(folder, rope=rope, dtype="float32", tp_plan="auto", max_length=4096)
    greedy = rw.SamplingParams(max_new_tokens=8, temperature=0)
    results[rope] = {
        "how": model._runner.how,
        "written": [completion.text for completion in model.generate(["import nump", "class A"], greedy)],
        "sampled": model.generate("def f(x):", rw.SamplingParams(max_new_tokens=8, temperature=1)).text,
        "losses": model.score_ids([i % 1000 for i in range(400)]).tolist(),
    }
with open(f"{out}/{os.environ['RANK']}.json", "w") as file:
    json.dump(results, file)

from ropewalk.cli.main import cli
cli(command)
"""
ROPES = ["none", "yarn:4", "rerope:64|logn", "dynamic-yarn"]


@pytest.fixture(scope="module")
def measured(tiny_folder):
    """The command whose run is compared."""
    arguments = ["passkey", str(tiny_folder), "--rope", "none", "--rope", "rerope:64|logn", "--lengths", "1x"]
    return [*arguments, "--depths", "0.5", "--trials", "1", "--dtype", "float32"]


@pytest.fixture(scope="module")
def split(tiny_folder, measured, tmp_path_factory):
    """The folder that two processes have written, each with a half of the model, and what they said."""
    out = tmp_path_factory.mktemp("split")
    (out / "script.py").write_text(SCRIPT)
    script = [out / "script.py", tiny_folder, out, ";".join(ROPES)]
    command = [*measured, "--max-minutes", "60", "--tp-plan", "auto", "--out", out / "run"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def launch(rank):
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
        return python(*script, *command, env={**where, "RANK": str(rank), "LOCAL_RANK": str(rank)})

    with ThreadPoolExecutor() as threads:
        processes = list(threads.map(launch, range(2)))
    assert not any(done.returncode for done in processes), processes[0].stderr[-3000:] + processes[1].stderr[-3000:]
    return out, "".join(done.stdout for done in processes)


@pytest.mark.slow
def test_two_processes_compute_what_one_does(tiny_folder, split):
    first, second = (json.loads((split[0] / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second, "also what was sampled without a seed"
    for rope in ROPES:
        whole = rw.load(tiny_folder, rope=rope, dtype="float32", compile=False, max_length=4096)
        greedy = rw.SamplingParams(max_new_tokens=8, temperature=0)
        assert [completion.text for completion in whole.generate(["import nump", "class A"], greedy)] == first[rope][
            "written"
        ]
        losses = whole.score_ids([i % 1000 for i in range(400)]).tolist()
        assert losses == pytest.approx(first[rope]["losses"], abs=1e-4)
        assert "split over 2 processes" in first[rope]["how"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "this one was started alone; start two or more by torchrun"),
        ({"rank": "0", "world_size": "1"}, "this one was started alone"),
        ({"tp_plan": "rows"}, "tp_plan 'rows' is not 'auto'"),
        ({"device_map": "auto", "rank": "0"}, "both say where the weights are"),
        ({"compile": True, "rank": "0"}, "need the whole model in one process"),
        ({"dtype": "int8", "rank": "0"}, "need the whole model in one process"),
    ],
)
def test_what_cannot_be_split_is_refused(tiny_folder, monkeypatch, options, words):
    options = {"tp_plan": "auto"} | options
    for name in ("rank", "world_size"):
        if name in options:
            monkeypatch.setenv(name.upper(), options.pop(name))
    with pytest.raises(rw.ConfigError, match=words):
        rw.load(tiny_folder, **options)


def test_layers_are_placed_as_accelerate_does(tiny_folder):
    ids = list(range(300))
    placed = rw.load(tiny_folder, rope="yarn:4", dtype="float32", device_map="auto", compile=False)
    whole = rw.load(tiny_folder, rope="yarn:4", dtype="float32", compile=False)
    assert placed.score_ids(ids).tolist() == pytest.approx(whole.score_ids(ids).tolist(), abs=1e-4)


def test_a_model_with_layers_on_disk_is_known_by_the_others(tiny_folder):
    parts = (
        "model.embed_tokens",
        "model.norm",
        "model.rotary_emb",
        "lm_head",
        *(f"model.layers.{n}" for n in range(4)),
    )
    where = {**dict.fromkeys(parts, "cpu"), "model.layers.0": "disk"}
    placed = rw.load(tiny_folder, dtype="float32", device_map=where, compile=False)
    assert any(weight.is_meta for weight in placed.hf.parameters())
    (row,) = rw.evals.perplexity(placed, [list(range(64))], lengths=[64], target=32)
    assert row.tokens == 32
    assert placed.fingerprint == rw.load(tiny_folder, dtype="float32", device_map=where, compile=False).fingerprint


@pytest.mark.slow
def test_a_measurement_of_a_split_model_is_that_of_the_whole_one(measured, split, tmp_path):
    assert split[1].count("report.html") == 1, "one process writes"
    assert CliRunner().invoke(cli, [*measured, "--no-compile", "--out", str(tmp_path)]).exit_code == 0
    rows = {}
    for name, folder in (("split", split[0] / "run"), ("whole", tmp_path)):
        lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
        rows[name] = {line["key"]: line for line in lines}
        assert len(lines) == len(rows[name]) == 2, "each once"
    for key, row in rows["whole"].items():
        other = rows["split"][key]
        assert (row["generated"], row["correct"]) == (other["generated"], other["correct"])
        assert row["answer_logprob"] == pytest.approx(other["answer_logprob"], abs=1e-3)
