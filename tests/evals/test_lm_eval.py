"""The engine in lm-evaluation-harness, against the harness's own transformers model, and `disjoint` against both."""

import json
import subprocess
import sys

import pytest
import yaml
from click.testing import CliRunner
from tokenizers.processors import TemplateProcessing

import ropewalk as rw
from ropewalk.cli.main import cli
from ropewalk.evals.data import Text
from ropewalk.evals.models.measured import Start
from ropewalk.evals.protocols.whole_text import Disjoint

CODE = "def area(side):\n    return side * side\n\n\ndef volume(side):\n    return side ** 3\n" * 12


@pytest.fixture(scope="module")
def harness():
    return pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def ours(harness, tiny_folder):
    from ropewalk.evals.lm_eval import RopewalkLM

    lm = RopewalkLM(str(tiny_folder), dtype="float32", max_length=200)
    lm.model.rope = "yarn:2"
    yield lm


@pytest.fixture(scope="module")
def theirs(harness, tiny_folder):
    """The harness's own model of transformers, patched with the same scaler."""
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=str(tiny_folder), dtype="float32", max_length=200, device="cpu", batch_size=1)
    rw.patch(lm.model, "yarn:2")
    return lm


def requests(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=args, idx=n) for n, args in enumerate(arguments)]


def test_rolling_is_the_harness_and_is_disjoint(ours, theirs):
    asked = requests("loglikelihood_rolling", (CODE,), (CODE[:90],))
    found, expected = (lm.loglikelihood_rolling(asked, disable_tqdm=True) for lm in (ours, theirs))
    assert found == pytest.approx(expected, abs=1e-3 * len(CODE) / 4)
    for (document,), nats in zip((one.arguments for one in asked), expected, strict=True):
        text = Text(name="code", documents=(document,), sha256="0" * 64)
        settings = {"protocol": "disjoint", "lengths": [200], "ropes": ["yarn:2"], "text_tokens": 10_000}
        (row,) = rw.evals.perplexity(ours.model, text, **settings)
        assert row.tokens == len(ours.tok_encode(document))
        assert row.loss == pytest.approx(-nats / row.tokens, abs=1e-3)
        assert row.bits_per_byte == pytest.approx(-nats / len(document.encode()) / 0.6931472, abs=1e-3)


def test_auto_is_the_untouched_model_where_the_harness_feeds_the_trained_length(harness, tiny_folder):
    from ropewalk.evals.lm_eval import RopewalkLM

    lm, asked, found = RopewalkLM(str(tiny_folder), max_length=256), requests("loglikelihood_rolling", (CODE * 2,)), []
    for rope in ("none", "auto"):
        lm.model.rope = rope
        found += lm.loglikelihood_rolling(asked, disable_tqdm=True)
    assert found[0] == found[1]


@pytest.mark.parametrize("length", [1, 63, 64, 65, 128, 200])
def test_windows_are_the_harness_windows(harness, length):
    from lm_eval.utils import get_rolling_token_windows

    ids = list(range(1, length + 1))
    windows = Disjoint(contexts=(64,)).windows([ids], 64, Start(prefix=[], token=0))
    given = get_rolling_token_windows(ids, prefix_token=0, max_seq_len=64, context_len=1)
    expected = [([*before, after[-1]], after) for before, after in given]
    assert [(w.ids, w.ids[w.first :]) for w in windows] == expected


def test_loglikelihood_is_the_harness(ours, theirs):
    pairs = [("def f(x):\n    return", " x"), ("import ", "os"), ("", "class A:"), (CODE, "\n"), ("a = 1  ", "b")]
    asked = requests("loglikelihood", *pairs)
    found, expected = (lm.loglikelihood(asked, disable_tqdm=True) for lm in (ours, theirs))
    assert [sure for _, sure in found] == [sure for _, sure in expected]
    assert [nats for nats, _ in found] == pytest.approx([nats for nats, _ in expected], abs=1e-3)


def test_generation_is_the_harness(ours, theirs):
    settings = {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False}
    asked = requests("generate_until", ("def area(side):\n", settings), (CODE, settings | {"until": ["side"]}))
    found, expected = (lm.generate_until(asked, disable_tqdm=True) for lm in (ours, theirs))
    assert found == expected
    assert found[0]
    with pytest.raises(rw.ConfigError, match=r"unknown generation setting 'top_q'. Did you mean 'top_p'"):
        ours.generate_until(requests("generate_until", ("a", settings | {"top_q": 1})), disable_tqdm=True)
    with pytest.raises(rw.ConfigError, match="500 new tokens leave no room for a prompt within 200"):
        ours.generate_until(requests("generate_until", ("a", settings | {"max_gen_toks": 500})), disable_tqdm=True)


@pytest.mark.slow
def test_a_task_from_the_shell(harness, tiny_folder, tmp_path):
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps({"page": CODE[n:]}) for n in range(3)), encoding="utf-8")
    task = {
        "task": "pages",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}},
        "output_type": "loglikelihood_rolling",
        "test_split": "test",
        "doc_to_text": "",
        "doc_to_target": "{{page}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    (tmp_path / "pages.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    model = {"model": str(tiny_folder), "rope": "linear:8", "dtype": "float32", "max_length": 256}
    command = [sys.executable, "-m", "ropewalk", "lm-eval", "run", "--model", "ropewalk", "--tasks", "pages"]
    command += ["--model_args", json.dumps(model), "--include_path", str(tmp_path), "--output_path", str(tmp_path)]
    environment = {"HF_HOME": str(tmp_path / "hub"), "HF_DATASETS_OFFLINE": "1", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    (results,) = tmp_path.rglob("results*.json")
    found = json.loads(results.read_text(encoding="utf-8"))["results"]["pages"]["bits_per_byte,none"]
    text = Text(name="pages", documents=tuple(CODE[n:] for n in range(3)), sha256="0" * 64)
    loaded = rw.load(tiny_folder, rope="linear:8", dtype="float32", compile=False)
    (row,) = rw.evals.perplexity(loaded, text, protocol="disjoint", lengths=[256], text_tokens=10_000)
    assert found == pytest.approx(row.bits_per_byte, abs=1e-3)


def test_without_the_harness_the_command_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    done = CliRunner().invoke(cli, ["lm-eval", "ls", "tasks"])
    assert isinstance(done.exception, rw.ConfigError)
    assert "pip install 'ropewalk[lm-eval]'" in str(done.exception)
    assert "lm-evaluation-harness with a model" in CliRunner().invoke(cli, ["lm-eval", "--help"]).output


def test_a_context_is_never_closed_and_begins_once(harness, tiny_folder, ours):
    """A tokenizer with an end token gives what one without gives, and a chat's text brings its own start token."""
    from ropewalk.evals.lm_eval import RopewalkLM

    mark = "<|endoftext|>"
    closing = RopewalkLM(str(tiny_folder), dtype="float32", max_length=200, rope="yarn:2")
    closing.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {mark}", special_tokens=[(mark, 0)]
    )
    asked = requests("loglikelihood", ("def f(x):\n    return", " x"), (CODE, "\n"))
    found, expected = (lm.loglikelihood(asked, disable_tqdm=True) for lm in (closing, ours))
    assert [nats for nats, _ in found] == pytest.approx([nats for nats, _ in expected], abs=1e-6)
    asked = requests("generate_until", (CODE[:60], {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False}))
    assert closing.generate_until(asked, disable_tqdm=True) == ours.generate_until(asked, disable_tqdm=True)
    closing.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{mark} $A {mark}", special_tokens=[(mark, 0)]
    )
    bare = closing.tok_encode(CODE, add_special_tokens=False)
    assert closing.tok_encode(CODE) == closing.tok_encode(mark + CODE) == [0, *bare]
    assert closing.tok_encode(mark, add_special_tokens=False) == [0]
