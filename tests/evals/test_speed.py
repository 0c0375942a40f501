"""The benchmark of position maps: the public form is the same attention, and the command tells its costs."""

import json

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import ropewalk as rw
from ropewalk.cli.main import cli
from ropewalk.engine.attention.kernel import AttentionScore
from ropewalk.engine.attention.reference import reference_attention
from ropewalk.engine.attention.rotation import Layout
from ropewalk.engine.rotary_site import RotarySite
from ropewalk.evals.speed.map_cost import check_maps, naive_attention
from ropewalk.scaling import RopeSpec, Scaler, parse
from ropewalk.scaling.hf import ConfiguredRope


@pytest.mark.parametrize(
    "spec",
    [
        "rerope:40",
        "self-extend:4,window=40",
        "dual-chunk",
        "leaky-rerope:40,k=3",
        "yarn:2|rerope:40|logn",
        "jet-long:40",
    ],
)
def test_the_public_form_is_the_literal_twin(spec):
    rope, scaler = RopeSpec(dim=16, base=1e4, trained_length=128), parse(spec)
    configured = ConfiguredRope(rope=rope, scaler=Scaler(), max_length=128)
    site = RotarySite(module=nn.Module(), layer_type=None, configured=configured)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, 300, 16, dtype=torch.float64, generator=generator) for h in (4, 2, 2))
    twin = reference_attention(q, k, v, AttentionScore(scale=0.25), Layout(0, 16, False), scaler, rope, length=300)
    assert (naive_attention(q, k, v, 0.25, scaler, site) - twin).abs().max() < 1e-10


def test_speed_tells_costs_as_json(tiny_folder):
    arguments = ["speed", str(tiny_folder), "--lengths", "256,2x", "--repeats", "1", "--public-form", "--json"]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    costs = json.loads(result.stdout)["costs"]
    assert {cost["what"] for cost in costs} == {"prefill attention", "prefill attention, public form", "decode"}
    assert {cost["length"] for cost in costs} == {256, 512}
    assert {"plain attention", "none", "rerope:64", "self-extend:8,window=64", "dual-chunk"} == {
        cost["scaler"] for cost in costs
    }
    assert all(cost["ratio"] > 0 and len(cost["seconds"]) == 1 for cost in costs)
    assert "run by compiled steps" in result.stderr
    assert "compiled steps" in json.loads(result.stdout)["network"]


def test_a_scaler_without_a_map_is_refused():
    with pytest.raises(rw.ConfigError, match="yarn:4 has no position map"):
        check_maps([parse("rerope:2k"), parse("yarn:4")])


@pytest.mark.slow
def test_against_compares_engines_as_json(tiny_folder, prepared_processes):
    arguments = ["speed", str(tiny_folder), "--against", "hf:float32", "--lengths", "2x,64"]
    arguments += ["--new-tokens", "4", "--repeats", "2", "--prefill-repeats", "1", "--threads", "1", "--json"]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    printed = json.loads(result.stdout)
    rows = [(t["engine"], t["what"], t["length"], len(t["seconds"])) for t in printed["timings"]]
    whats = [(what, n, turns) for n in (64, 512) for what, turns in (("prefill", 1), ("decode", 2))]
    assert sorted(rows) == sorted((e, *what) for e in ("ropewalk float32", "hf float32") for what in whats)
    for agreement in printed["agreements"]:
        assert agreement["same"] == agreement["compared"] == 5
        assert agreement["difference"] < 1e-3
    assert printed["threads"] == 1
    assert {"python", "ropewalk", "torch", "transformers"} <= printed["versions"].keys()
    assert printed["bandwidth_gb_s"] > 0


def test_the_tables_of_a_comparison_say_that_the_fast_engine_did_not_run(tiny_folder, prepared_processes):
    arguments = ["speed", str(tiny_folder), "--against", "hf:float32", "--lengths", "64", "--dtype", "float16"]
    arguments += ["--new-tokens", "2", "--repeats", "1", "--prefill-repeats", "1", "--threads", "1"]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False, env={"COLUMNS": "160"})
    rows = [line for line in result.output.splitlines() if line.startswith("       64")]
    assert len(rows) == 6 and sum("ropewalk float16 (by transformers' modules)" in row for row in rows) == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--against", "hf", "--rope", "rerope:64"], "leave out --rope"),
        (["--against", "hf", "--no-decode"], "leave out --decode"),
        (["--new-tokens", "4"], "--new-tokens needs --against"),
        (["--threads", "1"], "--threads needs --against"),
    ],
)
def test_options_of_the_other_measurement_are_refused(tiny_folder, options, words):
    result = CliRunner().invoke(cli, ["speed", str(tiny_folder), *options])
    assert result.exit_code == 2
    assert words in result.output
