"""`ropewalk ppl` with the protocols that need more than windows: options, files, and going on with a run."""

import re
import sysconfig
from pathlib import Path

import pytest
from click.testing import CliRunner

import ropewalk as rw
from ropewalk.cli.main import cli
from ropewalk.evals.protocols import longppl
from ropewalk.evals.runs.result import Run


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "source.py"
    file.write_text((Path(sysconfig.get_path("stdlib")) / "textwrap.py").read_text(encoding="utf-8"), encoding="utf-8")
    return file


def ppl(tiny_folder, source, out, *options):
    arguments = [
        "ppl",
        str(tiny_folder),
        "--no-compile",
        "--dtype",
        "float32",
        "--text",
        str(source),
        "--out",
        str(out),
    ]
    return CliRunner().invoke(cli, [*arguments, *options])


def test_harm_leaves_tables_and_bars(tiny_folder, source, tmp_path, request):
    options = ("--protocol", "harm", "--rope", "yarn:2", "--rope", "linear:2", "--lengths", "0.5x,1x", "--samples", "2")
    done = ppl(tiny_folder, source, tmp_path, *options)
    assert done.exception is None, done.output
    table = (tmp_path / "table.md").read_text()
    assert "harm: all tokens, against the untouched model at the same context." in table
    for title in ("KL divergence from the untouched model", "Same likeliest token", "Loss difference to the untouched"):
        assert title in table
    assert table.count("| `yarn:2` | ") == 4
    assert {file.name for file in tmp_path.glob("*.png")} == {"harm.png"}
    rows = Run(tmp_path).rows
    assert [(row["rope"], row["context"], row["tokens"]) for row in rows] == [
        (rope, context, 2 * context - 2) for rope in ("yarn:2", "linear:2") for context in (128, 256)
    ]
    assert all(0 < row["kl_low"] < row["kl"] < row["kl_high"] for row in rows)
    assert all(0 < row["same_top1"] < 100 for row in rows)
    request.getfixturevalue("no_plots")
    again = ppl(tiny_folder, source, tmp_path, *options)
    assert "tokens scored" in done.output
    assert "tokens scored" not in again.output


def test_the_judge_of_an_interrupted_run_is_not_asked_again(tiny_folder, source, no_plots, tmp_path, monkeypatch):
    monkeypatch.setattr(longppl, "GAIN", 0.0)
    options = ("--protocol", "longppl", "--lengths", "1x,2x", "--target", "64", "--rope")
    done = ppl(tiny_folder, source, tmp_path, *options, "none", "--samples", "2")
    assert done.exception is None, done.output
    keys = Run(tmp_path).rows[-1]["tokens"]
    assert f"{keys} of 128 tokens scored" in done.output
    table = (tmp_path / "table.md").read_text()
    assert f"{keys} of 128 tokens that need far context, the same everywhere, chosen by dual-chunk at 512" in table
    again = ppl(tiny_folder, source, tmp_path, *options, "yarn:2", "--samples", "2")
    measured = again.output.partition("Loss in nats")[0]
    assert "dual-chunk at judge" in measured and not re.search("dual-chunk +judge", measured)
    rows = Run(tmp_path).rows
    assert [row["rope"] for row in rows if row["task"] == "judge"] == ["dual-chunk"] * 2
    assert {row["tokens"] for row in rows if row["task"] == "ppl"} == {keys}
    assert "| `yarn:2` |" in (tmp_path / "table.md").read_text()
    monkeypatch.setattr(longppl, "GAIN", 9.0)
    few = ppl(tiny_folder, source, tmp_path / "few", *options, "none")
    assert isinstance(few.exception, rw.DataError)
    assert "key tokens among 64 (512 of context against 256); longppl needs at least 16" in str(few.exception)


def test_places_are_added_until_the_interval_is_narrow(tiny_folder, source, no_plots, tmp_path):
    options = ("--rope", "none", "--rope", "yarn:2", "--lengths", "0.5x,1x", "--target", "32", "--interval")
    done = ppl(tiny_folder, source, tmp_path, *options, "9")
    assert done.exception is None, done.output
    assert "4 places: every difference is known well enough" in done.output
    rows = Run(tmp_path).rows
    assert {row["documents"] for row in rows if row["task"] == "ppl"} == {4}
    assert len([row for row in rows if row["task"] == "place"]) == 16
    table = (tmp_path / "table.md").read_text()
    assert "| `yarn:2` |" in table
    again = ppl(tiny_folder, source, tmp_path, *options, "1e-9", "--samples", "8")
    assert "8 places: " in again.output
    assert {row["documents"] for row in Run(tmp_path).rows if row["task"] == "ppl"} == {4, 8}
    planned = ppl(tiny_folder, source, tmp_path / "planned", *options, "1e-9", "--samples", "8", "--dry-run")
    assert "4 cells" in planned.output
    assert not (tmp_path / "planned").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--protocol", "harm", "--interval", "1"], "--interval has no effect on harm; .* --protocol fixed-target"),
        (["--protocol", "harm", "--stride", "3"], "--stride has no effect on harm; .* --protocol sliding"),
        (["--judge", "none"], "--judge has no effect on fixed-target; leave it out, or use --protocol longppl"),
        (
            ["--protocol", "repeat", "--tokens", "8k"],
            "--tokens has no effect on repeat; .* sliding, llamacpp, disjoint",
        ),
        (["--tokens", ""], "'' is not a length"),  # a shell variable that is not set
        (["--judge", ""], "a scaler is empty"),
        (["--protocol", "llama"], "unknown protocol 'llama'. Did you mean 'llamacpp'"),
        (["--protocol", "harm", "--lengths", "2x"], "trained length is 256; the context 512 is beyond it"),
        (["--protocol", "longppl", "--lengths", "1x"], "the longest context, 256, with the trained length, 256"),
        (["--protocol", "llamacpp", "--lengths", "1x", "--tokens", "400"], "two chunks: 512 tokens of text"),
    ],
)
def test_mistakes(tiny_folder, source, tmp_path, options, message):
    done = ppl(tiny_folder, source, tmp_path, *options)
    assert isinstance(done.exception, rw.RopewalkError), done.output
    with pytest.raises(rw.RopewalkError, match=message):
        raise done.exception


@pytest.mark.parametrize(("ropes", "measured"), [((), ["none", "rerope:64"]), (("none",), ["none"])])
def test_the_scaler_that_a_folder_names_is_measured_unless_others_are_asked_for(
    tiny_folder, source, no_plots, tmp_path, ropes, measured
):
    folder = rw.export(tiny_folder, tmp_path / "named", rope="rerope:64", length="4x").path
    options = [word for rope in ropes for word in ("--rope", rope)]
    done = ppl(folder, source, tmp_path / "run", *options, "--lengths", "2x", "--samples", "1", "--target", "8")
    assert done.exception is None, done.output
    assert [row["rope"] for row in Run(tmp_path / "run").rows] == measured
    assert ("names rerope:64, which is measured too" in done.output) == (ropes == ())
