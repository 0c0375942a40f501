"""`ropewalk ask` and `ruler`: an option that none of the chosen tasks uses is refused."""

import pytest
from click.testing import CliRunner

from ropewalk.cli.main import cli


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (["ask", "many-shot"], "--depths"),
        (["ask", "many-shot"], "--text"),
        (["ask", "facts-noise-1"], "--depths"),
        (["ask", "ngram-copy"], "--text"),
        (["ruler", "--tasks", "vt,cwe"], "--text"),
    ],
)
def test_an_option_that_no_task_uses_is_refused(tiny_folder, tmp_path, command, option):
    value = {"--depths": "0.5", "--text": "pydoc"}[option]
    arguments = [*command, str(tiny_folder), option, value, "--out", str(tmp_path), "--dry-run"]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code != 0
    assert (
        f"{option} has no effect on {command[-1].replace(',', ', ')}; leave it out" in str(done.exception) + done.output
    )


@pytest.mark.parametrize(
    ("command", "options"),
    [
        (["ask", "ngram-copy"], ["--depths", "0.5"]),
        (["ask", "needle-meaning"], ["--depths", "0.5", "--text", "pydoc"]),
        (["ask", "many-shot"], []),
        (["ruler", "--tasks", "niah_single_2,vt"], ["--text", "pydoc"]),
    ],
)
def test_options_that_a_task_uses_are_taken(tiny_folder, tmp_path, command, options):
    arguments = [*command, str(tiny_folder), *options, "--lengths", "2k", "--out", str(tmp_path), "--dry-run"]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, done.output
