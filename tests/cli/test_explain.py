"""`ropewalk explain` and `ropewalk export` as people type them."""

import json
from pathlib import Path

import gguf
import pytest
from click.testing import CliRunner

from ropewalk.cli.main import cli
from ropewalk.errors import ConfigError
from ropewalk.evals.reports.rope_plots import plot_readings
from ropewalk.scaling.serving import read_all


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    return lambda *args: CliRunner().invoke(cli, [*map(str, args)], catch_exceptions=False)


def line_of(result, engine):
    return next(line for line in result.output.split("\n") if line.strip().startswith(engine))


@pytest.fixture
def exported(tiny_folder, tmp_path, run):
    result = run("export", tiny_folder, tmp_path / "out", "--rope", "yarn:4,attention_factor=1.3")
    assert "yarn:4,attention_factor=1.3 up to 1k tokens, as rope_type 'yarn' in config.json" in result.output
    return tmp_path / "out"


def test_the_table_says_what_each_engine_computes(run, exported):
    result = run("explain", exported)
    for engine, m, differs in (("vLLM", "1.3", False), ("SGLang", "1.139", True), ("llama.cpp", "1.139", True)):
        line = line_of(result, engine)
        assert f" {m} " in line and ("differs" in line) == differs
    assert "SGLang ignores attention_factor" in result.output
    by_config = run("explain", exported / "config.json").output
    assert by_config[by_config.index("  engine ") :] == result.output[result.output.index("  engine ") :]


def test_what_was_exported_for_servers_differs_nowhere_there(run, tiny_folder, tmp_path):
    made = run("export", tiny_folder, tmp_path / "out", "--rope", "yarn:4,attention_factor=1.3", "--target", "sglang")
    assert f"serve it by: python -m sglang.launch_server --model-path {tmp_path / 'out'}" in made.output
    result = run("explain", tmp_path / "out")
    for engine in ("vLLM", "SGLang"):
        assert "differs" not in line_of(result, engine)


def test_a_gguf_name_for_a_folder_is_refused_with_the_option(run, tiny_folder, tmp_path):
    with pytest.raises(ConfigError, match=r"--target 'hf' writes a folder; take --target 'llama\.cpp'"):
        run("export", tiny_folder, tmp_path / "a.gguf", "--rope", "yarn:4")
    assert not any(tmp_path.iterdir())


def test_gguf_files_are_explained(run, tiny_folder, tmp_path):
    run("export", tiny_folder, tmp_path / "a.gguf", "--rope", "yarn:4", "--target", "llama.cpp", "--dtype", "q8_0")
    result = run("explain", tmp_path / "a.gguf")
    assert "yarn:4" in line_of(result, "llama.cpp") and "linear:4" in line_of(result, "Ollama's own engine")
    assert "differs" in line_of(result, "transformers")


def test_it_is_drawn(run, exported, tmp_path):
    result = run("explain", exported, "--out", tmp_path / "read.png")
    assert (tmp_path / "read.png").stat().st_size > 10_000 and "drawn" in result.output
    drawn = (tmp_path / "read.svg").read_text()
    assert "transformers, vLLM, ExLlamaV3: m = 1.3" in drawn and "SGLang, llama.cpp, mlx-lm: m = 1.139" in drawn


@pytest.mark.parametrize("name", ["[v2]", "[", "x[/a]"])
def test_names_are_shown_as_they_are(run, tiny_folder, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    folder = Path(name)
    folder.mkdir(parents=True)
    config = json.loads((tiny_folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    (folder / "config.json").write_text(json.dumps(config))
    shown = run("explain", folder / "config.json", "--out", folder / "x.png").output
    assert f"{name}/config.json: rotary" in shown and f"drawn  {name}/x.png" in shown


def test_engines_that_refuse_are_left_out_of_the_plot(tiny_folder, tmp_path):
    config = json.loads((tiny_folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    readings = read_all(config)
    assert {one.engine for one in readings if one.scaler is None} == {"ExLlamaV3"}
    _, svg = plot_readings(readings, 1024, "tiny", tmp_path / "d")
    assert "ExLlamaV3" not in svg.read_text()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is no JSON"),
        ("[1]", "holds no object"),
        ('{"model_type": "llama", "rope_parameters": {"rope_type": "spiral"}}', "does not accept|not supported"),
        ('{"model_type": "gpt2"}', "has no rotary embedding"),
    ],
)
def test_what_is_no_config_is_refused(run, tmp_path, content, words):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(Exception, match=words):
        run("explain", tmp_path / "config.json")
    with pytest.raises(Exception, match="cannot be read"):
        run("explain", tmp_path / "none.json")


def test_the_column_serves_is_each_engines_own(run, tmp_path):
    models = json.loads((Path(__file__).resolve().parents[1] / "data" / "served.json").read_text())
    for name, vllm, llama_cpp in (("Phi-4-mini", "4k", "128k"), ("Command-R", "128k", "128k"), ("Aya-23", "8k", "8k")):
        (tmp_path / "config.json").write_text(json.dumps(models[name]["config"]))
        result = run("explain", tmp_path / "config.json")
        assert f" {vllm} " in line_of(result, "vLLM") and f" {llama_cpp} " in line_of(result, "llama.cpp")


def test_a_gguf_file_whose_context_stays_at_the_trained_length(run, tiny_folder, tmp_path):
    run("export", tiny_folder, tmp_path / "a.gguf", "--rope", "yarn:4", "--target", "llama.cpp", "--dtype", "q8_0")
    file = gguf.GGUFReader(tmp_path / "a.gguf", "r+")
    field = file.fields["llama.context_length"]
    assert field.parts[field.data[0]][0] == 1024
    field.parts[field.data[0]][0] = 256
    file.data.flush()
    assert " 256 " in line_of(run("explain", tmp_path / "a.gguf"), "llama.cpp")
