"""The export to vLLM and SGLang: no warning, and a script that serves the folder."""

import json
import logging
import os
import stat
import subprocess
import warnings

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import ropewalk as rw


@pytest.mark.parametrize("target", ["vllm", "sglang"])
def test_transformers_prints_no_warning(tiny_folder, tmp_path, target, monkeypatch):
    """It would warn of the keys `short_mscale` and `long_mscale`, which it does not read."""
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: pytest.fail(record.getMessage()))
    monkeypatch.setattr(logging.getLogger("transformers"), "handlers", [handler])
    done = rw.export(tiny_folder, tmp_path / "out", rope="mrrope:4", target=target)
    assert "short_mscale" in json.loads((done.path / "config.json").read_text())["rope_parameters"]


def test_servers_get_a_script_with_the_command_and_the_overrides(tiny_folder, tmp_path):
    for target, words in (("vllm", "vllm serve"), ("sglang", "sglang.launch_server")):
        done = rw.export(tiny_folder, tmp_path / target, rope="ntk-mixed:4", target=target)
        script = done.path / "serve.sh"
        assert script.stat().st_mode & stat.S_IXUSR and words in done.command and " 1024" in done.command
        fake = tmp_path / "bin" / done.command.split()[0]
        fake.parent.mkdir(exist_ok=True)
        fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
        fake.chmod(0o755)
        arguments = subprocess.run(
            [script, "--port", "1"],
            env={"PATH": f"{fake.parent}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split("\n")
        assert str(done.path) in arguments and "1024" in arguments and "--port" in arguments
        quoted = next(line for line in script.read_text().split("\n") if "rope_parameters" in line)
        overrides = json.loads(quoted[quoted.index("{") : quoted.rindex("}") + 1])
        config = json.loads((done.path / "config.json").read_text())
        assert all(config[key] == value for key, value in overrides.items())


@pytest.mark.parametrize("target", ["vllm", "sglang"])
def test_a_folder_for_a_server_without_a_tokenizer_is_said(tiny_folder, tmp_path, target):
    hf_model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    with pytest.warns(UserWarning, match=f"bare has no tokenizer, which {target} needs; export with tokenizer="):
        rw.export(hf_model, tmp_path / "bare", rope="yarn:2", target=target)
    with warnings.catch_warnings(action="error"):
        tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
        rw.export(hf_model, tmp_path / "whole", rope="yarn:2", target=target, tokenizer=tokenizer)
        rw.export(tiny_folder, tmp_path / "copy", rope="yarn:2", target=target)
    assert AutoTokenizer.from_pretrained(tmp_path / "whole").vocab == tokenizer.vocab
