"""The memory benchmark: both engines score the same text, and the parts add up."""

import json

import pytest
from click.testing import CliRunner

from ropewalk.cli.main import cli


def test_lengths_without_room_for_what_is_scored_are_refused(tiny_folder):
    result = CliRunner().invoke(cli, ["memory", str(tiny_folder), "--lengths", "2k,1k"])
    assert result.exit_code == 2
    assert "each must be more than the 1024 tokens that are scored" in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dtype", "foo"], "'foo' is not one of 'float32', 'bfloat16'"),
        (["--rope", "yran:2"], "unknown scaler 'yran'"),
    ],
)
def test_wrong_options_are_refused_before_the_text_is_read(tiny_folder, monkeypatch, options, message):
    monkeypatch.setattr("ropewalk.evals.data.load_text", lambda name: pytest.fail("the text was read"))
    result = CliRunner().invoke(cli, ["memory", str(tiny_folder), *options])
    assert message in result.output + str(result.exception)


@pytest.mark.slow
def test_both_engines_score_the_text_and_tell_their_memory(tiny_folder, tmp_path, held_out_texts, prepared_processes):
    (tmp_path / "text.txt").write_text("".join(held_out_texts))
    options = ["--lengths", "2k", "--text", str(tmp_path / "text.txt"), "--dtype", "float32", "--against-hf", "--json"]
    result = CliRunner().invoke(cli, ["memory", str(tiny_folder), *options])
    assert result.exit_code == 0, result.output
    ours, theirs = json.loads(result.stdout)
    assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
    for one in (ours, theirs):
        assert 0 < one["imports"] <= one["loaded"] <= one["peak"]
        assert one["rest"] == pytest.approx(one["peak"] - one["weights"] - one["cache"])
