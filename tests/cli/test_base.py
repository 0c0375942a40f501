"""`ropewalk base`: the bound alone, and the rules beside it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from ropewalk.cli.main import cli
from ropewalk.errors import ConfigError


def base(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["base", *arguments], catch_exceptions=False)


def rows(text: str) -> dict[str, list[str]]:
    """Cells of the rules' table by the rule's name."""
    lines = text.partition("assumes\n")[2].splitlines()
    cells = [[cell for cell in line.split("  ") if cell] for line in lines if line.count("  ") > 3]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in cells}


def test_the_bound_alone() -> None:
    text = base("1k", "--dim", "128", "--base", "1e4").output
    assert "4293.43757" in text
    assert "6018.28" in text
    assert "your base 10000                 carries all 1k" in text
    assert "rule" not in text
    assert base("1k").output.splitlines() == [line for line in text.splitlines() if "your base" not in line]


def test_the_rules_by_hand() -> None:
    text = base("4x", "--dim", "64", "--base", "1e4", "--trained", "512").output
    assert "2k tokens, rotary dimension 64" in text
    assert "From base 10000, trained on 512 tokens (L):" in text
    table = rows(text)
    assert len(table) == 7
    assert table["own base"][:3] == ["10000", "fails at 725", "base:10000"]
    assert table["NTK-aware"][2] == "ntk:4"
    assert table["critical base"][2] == "critical-base:2k"
    assert table["smallest feasible"][1:3] == ["carries 2k", "base-bound:2k"]
    assert table["every base above"][1] == "carries 2k"
    assert table["every base above"][2] == "base:" + table["every base above"][0]
    assert table["paper's fit"][0] == "10428.2"


def test_the_rules_from_a_config(tmp_path: Path, tiny_folder: Path) -> None:
    shutil.copy(tiny_folder / "config.json", tmp_path)
    text = base("4x", "--model", str(tmp_path), "--out", str(tmp_path / "base.png")).output
    assert "1k tokens, rotary dimension 32" in text
    assert "trained on 256 tokens" in text
    assert rows(text)["NTK-aware"][2] == "ntk:4"
    assert text.endswith(f"drawn  {tmp_path / 'base.png'}\ndrawn  {tmp_path / 'base.svg'}\n")
    assert (tmp_path / "base.png").stat().st_size > 10_000


def test_a_model_with_a_scaling_of_its_own(tmp_path: Path, tiny_folder: Path) -> None:
    """`4x` is four times what the model reads; the rules count from what its plain frequencies were trained on."""
    config = json.loads((tiny_folder / "config.json").read_text(encoding="utf-8"))
    theta = config.pop("rope_theta", None) or config.pop("rope_parameters")["rope_theta"]
    scaling = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128, "rope_theta": theta}
    (tmp_path / "config.json").write_text(json.dumps({**config, "rope_parameters": scaling}), encoding="utf-8")
    text = base("4x", "--model", str(tmp_path)).output
    assert "1k tokens" in text and "trained on 128 tokens" in text
    assert rows(text)["NTK-aware"][2] == "ntk:8"
    assert "own yarn scaling, to 256, is not in these numbers" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["1k", "--trained", "256"], "--trained 256 needs --base too"),
        (["1k", "--out", "x.png"], "--out draws the rules' bases; give --model, or --base and --trained"),
        (["1k", "--model", "m", "--dim", "64"], "--model m has its own dim; leave out --dim, or --model"),
    ],
)
def test_options_that_do_not_go_together(arguments: list[str], message: str) -> None:
    done = base(*arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())


def test_lengths_that_do_not_work() -> None:
    with pytest.raises(ConfigError, match="'4x' is a multiple of the trained length, which is not known here"):
        base("4x", "--base", "1e4")
    with pytest.raises(ConfigError, match="length 512 is below the trained length 1024"):
        base("512", "--base", "1e4", "--trained", "1k")


def test_a_dimension_of_nothing_is_not_the_default() -> None:
    for more in ([], ["--base", "1e4", "--trained", "1k"]):
        with pytest.raises(ConfigError, match="0 must be even"):
            base("4k", "--dim", "0", *more)
