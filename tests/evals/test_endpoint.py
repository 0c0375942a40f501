"""Models that are measured where they are served, held against the same model measured here."""

import re
import shutil
import socket

import numpy as np
import pytest
import running
import torch
from click.testing import CliRunner
from served import serving

import ropewalk as rw
from ropewalk.cli.main import cli
from ropewalk.evals.models.served import FORMS, ServedModel
from ropewalk.evals.runs.compare_runs import compare_runs
from ropewalk.evals.runs.result import Run

TIMING = (
    "key",
    "model",
    "dtype",
    "device",
    "tokenizer",
    "seconds",
    "tokens_per_second",
    "peak_memory_mb",
    "run_started",
)


@pytest.fixture(scope="module")
def model(tiny_folder):
    return rw.load(tiny_folder, max_length=2**31, compile=False)


@pytest.fixture(scope="module")
def named(tiny_folder, tmp_path_factory):
    """What MODEL names: the tokenizer and the config, and no weights."""
    folder = tmp_path_factory.mktemp("named") / "exported"
    shutil.copytree(tiny_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


@pytest.fixture(scope="module")
def book(tmp_path_factory, held_out_texts):
    file = tmp_path_factory.mktemp("text") / "book.txt"
    file.write_text(held_out_texts[0])
    return file


@pytest.fixture
def unpublished(monkeypatch):
    """Rows only: tables, plots and reports take most of the time."""
    monkeypatch.setattr("ropewalk.evals.reports.report.publish", lambda run, **rest: [])
    monkeypatch.setattr("ropewalk.evals.reports.report.print_results", lambda *rest: None)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr("ropewalk.evals.models.openai_server.PAUSES", (0.01, 0.01))


def ropewalk(*arguments):
    """The output; errors are raised."""
    return CliRunner().invoke(cli, [*map(str, arguments)], catch_exceptions=False).output


def passkey(named, server, out, *options, lengths="300"):
    where = ("--endpoint", server if isinstance(server, str) else server.url)
    return ropewalk(
        "passkey", named, *where, "--lengths", lengths, "--depths", "0,1", "--trials", 1, "--out", out, *options
    )


def plain(row):
    return {name: value for name, value in row.items() if name not in (*TIMING, "weights", "tokenizer_sha256")}


def assert_same(rows, expected):
    """But for where, when, and the last digits of log-probabilities."""
    assert len(rows) == len(expected) > 0
    for row, other in zip(rows, expected, strict=True):
        assert row["dtype"] == "served"
        assert plain(row).keys() == plain(other).keys()
        for name, value in plain(other).items():
            assert row[name] == (pytest.approx(value, abs=1e-4) if isinstance(value, float) else value), name


@pytest.mark.usefixtures("unpublished")
@pytest.mark.parametrize("suite", ["passkey", "kv"])
@pytest.mark.parametrize("tells", ["prompt_logprobs", "echo"])
def test_trials_are_those_of_the_same_model_here(model, tiny_folder, named, tmp_path, suite, tells):
    options = ("--lengths", {"passkey": "300", "kv": "500"}[suite], "--depths", "0,1", "--trials", 1)
    here, there = tmp_path / "here", tmp_path / "there"
    ropewalk(suite, tiny_folder, "--no-compile", *options, "--out", here)
    with serving(model, tells=tells) as server:
        shown = ropewalk(suite, named, "--endpoint", server.url, *options, "--out", there)
    assert f"tiny is served at {server.url}; log-probabilities: {tells}" in " ".join(shown.split())
    rows = Run(there).rows
    assert_same(rows, Run(here).rows)
    assert {(row["model"], row["device"], row["trained_length"]) for row in rows} == {
        (f"tiny at 127.0.0.1:{server.server_port}", server.url, 256)
    }
    assert {row["tokenizer"] for row in rows} == {str(named)}
    assert {body["max_tokens"] for body in server.asked[2:]} <= {1, 16, 48, *(row["answer_tokens"] for row in rows)}
    (pair,) = compare_runs(Run(here), Run(there)).pairs
    assert pair.a == pair.b


@pytest.mark.usefixtures("unpublished")
@pytest.mark.parametrize("tells", ["prompt_logprobs", "echo"])
@pytest.mark.parametrize("protocol", ["fixed-target", "by-position"])
def test_losses_are_those_of_the_same_model_here(model, tiny_folder, named, book, tmp_path, protocol, tells):
    options = ("--text", book, "--lengths", "1x,2x", "--protocol", protocol)
    options += ("--target", 64) if protocol == "fixed-target" else ()
    here, there = Run(tmp_path / "here"), tmp_path / "there"
    ropewalk("ppl", tiny_folder, "--no-compile", *options, "--out", here.folder)
    with serving(model, tells=tells) as server:
        ropewalk("ppl", named, "--endpoint", server.url, *options, "--out", there)
    here.refresh()
    run_there = Run(there)
    assert_same(run_there.rows, here.rows)
    for row, other in zip(run_there.rows, here.rows, strict=True):
        losses = run_there.losses(row)
        assert losses.dtype == np.float32
        np.testing.assert_allclose(losses, here.losses(other), atol=1e-4)


@pytest.mark.usefixtures("unpublished")
def test_an_export_that_names_a_scaler_is_measured_where_it_is_served(tiny_folder, book, tmp_path):
    """vLLM with the plug-in runs such a folder. Here the server runs the model under the scaler that it names."""
    scaler = "rerope:64|logn"
    exported = rw.export(tiny_folder, tmp_path / "exported", rope=scaler, target="vllm", length="4x").path
    there, here = tmp_path / "there", tmp_path / "here"
    with serving(rw.load(tiny_folder, rope=scaler, max_length=2**31, compile=False)) as server:
        options = ("--text", book, "--target", 64)
        ropewalk("ppl", exported, "--endpoint", server.url, *options, "--lengths", "0.5x", "--out", there)
        assert passkey(exported, server, tmp_path / "passkey")
    ropewalk("ppl", tiny_folder, "--no-compile", *options, "--lengths", "512", "--rope", scaler, "--out", here)
    (row,), (other,) = Run(there).rows, Run(here).rows
    assert (row["trained_length"], row["context"], row["tokenizer"]) == (1024, 512, str(exported))
    np.testing.assert_allclose(Run(there).losses(row), Run(here).losses(other), atol=1e-4)


def test_the_report_tells_where_it_was_measured(model, named, book, tmp_path):
    with serving(model) as server:
        ropewalk(
            "ppl",
            named,
            "--endpoint",
            server.url,
            "--text",
            book,
            "--lengths",
            "128",
            "--target",
            64,
            "--out",
            tmp_path,
        )
    assert f"tiny at 127.0.0.1:{server.server_port} (served) on" in (tmp_path / "table.md").read_text()
    text = ropewalk("reconstruct", tmp_path, "--row", 1)  # by the tokenizer that the row names
    assert text.strip() in book.read_text()


def test_a_server_without_log_probabilities_can_still_be_asked_to_write(model, tiny_folder, named, book, tmp_path):
    here, there, told = tmp_path / "here", tmp_path / "there", tmp_path / "told"
    with serving(model, tells="nothing") as server:
        shown = passkey(named, server, there)
        with pytest.raises(
            rw.ConfigError, match=r"gives no log-probabilities .* vLLM or SGLang.* work with this server"
        ):
            ropewalk("ppl", named, "--endpoint", server.url, "--text", book, "--out", told)
    assert not told.exists()
    assert "no log-probabilities of prompts" in " ".join(shown.split())
    assert "nats per token" not in shown
    rows = Run(there).rows
    ropewalk("passkey", tiny_folder, "--no-compile", "--lengths", 300, "--depths", "0,1", "--trials", 1, "--out", here)
    local = Run(here).rows
    for row, other in zip(rows, local, strict=True):
        assert [row[name] for name in row if name.startswith("answer_") and name != "answer_tokens"] == [None] * 3
        assert (row["generated"], row["correct"]) == (other["generated"], other["correct"])
    assert "Log-probability of the right answer" not in (there / "table.md").read_text()
    assert {"report.html", "table.csv", "passkey_heat.png"} <= {file.name for file in there.iterdir()}
    assert len(compare_runs(Run(there), Run(here)).pairs) == 1
    both = tmp_path / "both"
    ropewalk("report", here, there, "--out", both)
    assert (both / "table.md").read_text().count("Log-probability of the right answer") == 1


@pytest.mark.usefixtures("unpublished")
def test_a_run_goes_on_after_its_server_has_died(model, named, tmp_path):
    out = tmp_path / "run"
    with (
        serving(model, left=7) as server,
        pytest.raises(rw.EndpointError, match=r"could not be reached .* are stored") as told,
    ):
        passkey(named, server, out, "--trials", 2, lengths="300,400")
    assert f"{server.url}/completions" in str(told.value)
    stored_lines = (out / "results.jsonl").read_text().splitlines()
    assert len(stored_lines) == 2  # of 2 probes and 5 requests, two for each trial
    with serving(model, port=server.server_port) as again:
        passkey(named, again, out, "--trials", 2, lengths="300,400")
        assert len(again.asked) == 2 + 2 * 6
        passkey(named, again, out, "--trials", 2, lengths="300,400")
    lines = (out / "results.jsonl").read_text().splitlines()
    assert lines[:2] == stored_lines
    assert len(Run(out).rows) == len(lines) == 8


@pytest.mark.usefixtures("unpublished")
def test_what_passes_is_tried_again(model, named, tmp_path):
    with serving(model, troubles=(503, 429)) as server:
        passkey(named, server, tmp_path / "run")
        assert len(Run(tmp_path / "run").rows) == 2
        server.troubles = [500] * 3
        with pytest.raises(rw.EndpointError, match=r"answered 500 \(busy with something else\), in 3 tries"):
            passkey(named, server, tmp_path / "other")
        server.troubles = [400]
        with pytest.raises(rw.EndpointError, match="/completions answered 400: busy with something else"):
            passkey(named, server, tmp_path / "other")


@pytest.mark.usefixtures("unpublished")
def test_one_of_several_models_is_chosen(model, named, tmp_path):
    with serving(model, names=("a", "b")) as server:
        with pytest.raises(rw.ConfigError, match="serves a, b; choose one with --served-as"):
            passkey(named, server, tmp_path)
        with pytest.raises(rw.ConfigError, match=r"serves no model 'c'. Known: a, b"):
            passkey(named, server, tmp_path, "--served-as", "c")
        passkey(named, server, tmp_path, "--served-as", "b")
        assert {body["model"] for body in server.asked} == {"b"}
    assert Run(tmp_path).rows[0]["model"].startswith("b at ")


@pytest.mark.usefixtures("unpublished")
def test_longer_than_the_server_goes_is_refused_before_anything_is_asked(model, named, book, tmp_path):
    with serving(model, limit=400) as server:
        shown = passkey(named, server, tmp_path / "run", lengths="400")
        assert "at most 400 tokens" in " ".join(shown.split())
        asked = len(server.asked)
        with pytest.raises(rw.ContextOverflow, match=r"512 tokens exceed the 400 that .*--max-model-len"):
            passkey(named, server, tmp_path / "long", lengths="300,2x")
        ppl = ("ppl", named, "--endpoint", server.url, "--text", book, "--target", 64, "--out", tmp_path / "long")
        with pytest.raises(rw.ContextOverflow, match=r"400 tokens and the 1 that a server must write .* with 401"):
            ropewalk(*ppl, "--lengths", "300,400")
        assert len(server.asked) == asked + 4  # the probes
        assert not (tmp_path / "long").exists()
        ropewalk(*ppl, "--lengths", "399")


@pytest.mark.usefixtures("unpublished")
@pytest.mark.parametrize(
    ("command", "options"),
    [("ppl", ("--lengths", "1x,257", "--target", 64)), ("passkey", ("--lengths", "1x,268", "--depths", 0))],
)
def test_a_scaler_of_ropewalk_that_depends_on_the_length(tiny_folder, book, tmp_path, command, options):
    """The server and a model here use the scaler of the same length, at and just above the trained one too."""
    options += ("--text", book) if command == "ppl" else ("--trials", 1)
    ropewalk(command, tiny_folder, "--rope", "auto", "--no-compile", *options, "--out", tmp_path / "here")
    with running.serving(rw.load(tiny_folder, rope="auto", compile=False)) as (url, _):
        ropewalk(command, tiny_folder, "--endpoint", f"{url}/v1", *options, "--out", tmp_path / "there")
    here, there = Run(tmp_path / "here").rows, Run(tmp_path / "there").rows
    assert [row["chosen"] for row in here] == ["none", "self-extend:8,window=128"]
    loss = "loss" if command == "ppl" else "answer_logprob"
    assert [row[loss] for row in there] == pytest.approx([row[loss] for row in here], abs=1e-4)


@pytest.mark.parametrize("tells", ["prompt_logprobs", "echo"])
def test_which_tokens_are_the_likeliest(model, named, held_out_texts, tells):
    ids = model.tokenizer(held_out_texts[0]).input_ids[:100]
    with torch.inference_mode():
        laws = model.hf(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
    with serving(model, tells=tells, limit=101) as server:
        served = ServedModel(str(named), server.url)
        scored = served.score(ids, 20)
        with pytest.raises(rw.ContextOverflow, match="101 tokens and the 1"):
            served.score([*ids, 5], 20)
    likeliest = [int(law.argmax()) == token for law, token in zip(laws[19:], ids[20:], strict=False)]
    assert [one for _, one in scored] == likeliest
    assert 10 < sum(likeliest) < 70
    expected = [float(law[token]) for law, token in zip(laws[19:], ids[20:], strict=False)]
    assert [nats for nats, _ in scored] == pytest.approx(expected, abs=1e-4)


def test_the_servers_own_words_are_shown(model, named):
    with serving(model, limit=40) as server:
        served = ServedModel(str(named), server.url)
        served.limit = None
        with pytest.raises(rw.EndpointError, match=r"answered 400: This model's maximum context length is 40 tokens\."):
            served.score([5] * 40, 1)


def test_addresses_that_are_none(model, named, tmp_path):
    for url in ("localhost:8000/v1", "ftp://host/v1", "http://"):
        with pytest.raises(rw.ConfigError, match="no http address; give one such as http://localhost:8000/v1"):
            passkey(named, url, tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(
        rw.EndpointError, match=rf"127.0.0.1:{port}/v1/models could not be reached .*refused.*in 3 tries"
    ):
        passkey(named, f"http://127.0.0.1:{port}/v1", tmp_path)
    with serving(model) as server, pytest.raises(rw.EndpointError, match="404: Not Found; most addresses end in /v1"):
        passkey(named, server.url.removesuffix("/v1"), tmp_path)


def test_the_key_of_the_environment_is_sent_and_a_password_not_kept(model, named, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    with serving(model) as server:
        ServedModel(str(named), server.url)
        assert {*server.keys} == {"Bearer sesame"}
        monkeypatch.delenv("OPENAI_API_KEY")
        server.keys.clear()
        served = ServedModel(str(named), server.url.replace("//", "//me:hush@"))
        assert {key.split()[0] for key in server.keys} == {"Basic"}
    assert served.device == server.url
    assert "hush" not in served.name + served.describe()


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("passkey", ["--rope", "yarn:2"], "runs under the scaler of its server, not under yarn:2"),
        ("passkey", ["--rope", "auto"], "runs under the scaler of its server, not under auto"),
        ("passkey", ["--fake", "oracle"], "--fake replaces a network that is loaded here"),
        ("passkey", ["--dtype", "int8"], "--dtype has no effect on a model that is served"),
        ("kv", ["--kv-dtype", "int8"], "--kv-dtype has no effect on a model that is served"),
        ("ppl", ["--no-compile"], "^--no-compile has no effect on a model that is served"),
        ("ppl", ["--protocol", "harm", "--lengths", "128"], "compares the logits of all; leave out --endpoint"),
        ("ppl", ["--protocol", "longppl", "--lengths", "1x,2x"], "not under dual-chunk.*--judge none"),
    ],
)
def test_what_a_server_cannot_do(model, named, book, tmp_path, command, options, message):
    text = ["--text", book] if command == "ppl" else ["--lengths", "600"]
    with serving(model) as server, pytest.raises(rw.ConfigError, match=message):
        ropewalk(command, named, "--endpoint", server.url, *text, *options, "--out", tmp_path)
    assert Run(tmp_path).rows == []


def test_a_dry_run_asks_for_the_time_only(model, named, tmp_path):
    with serving(model, limit=512) as server:
        shown = " ".join(passkey(named, server, tmp_path / "run", "--dry-run").split())
        assert len(server.asked) == 4  # two probes, a first prompt, and one for the time
        assert len(server.asked[-1]["prompt"]) == 256
    assert "2 cells, about" in shown
    assert f"{server.url} reads prompts of up to 300 tokens" in shown
    assert not (tmp_path / "run").exists()


def test_served_as_needs_an_endpoint(tiny_folder, tmp_path):
    with pytest.raises(rw.ConfigError, match="--served-as has no effect without --endpoint"):
        ropewalk("passkey", tiny_folder, "--served-as", "a", "--out", tmp_path)


def test_an_answer_that_lost_its_log_probabilities_is_no_loss(model, named, monkeypatch):
    with serving(model) as server:
        served = ServedModel(str(named), server.url)
        server.tells = "nothing"
        message = re.escape(f"{server.url} answered a prompt of 9 tokens without the prompt_logprobs of each")
        with pytest.raises(rw.EndpointError, match=message):
            served.losses([*range(5, 14)], 1, lambda past, count: None)
    assert FORMS[0].read({"prompt_logprobs": [None, {"7": {"logprob": -1.0}}]}, [3, 7]) == [(-1.0, None)]


def test_a_token_that_the_served_model_has_not_is_refused_here(model, named):
    with serving(model) as server:
        served = ServedModel(str(named), server.url)
        asked = len(server.asked)
        with pytest.raises(rw.DataError, match="token id 5000 is not among this model's 0 to 1023"):
            served.score([1, 5000, 2], 1)
        assert len(server.asked) == asked
