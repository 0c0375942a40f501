"""The files of the README's table on the small model: written by `tests/train_tiny.py --held-out`."""

import subprocess
import sys
from pathlib import Path

from ropewalk.evals.data import load_text

SCRIPT = Path(__file__).parents[1] / "train_tiny.py"


def test_the_files_that_the_small_model_never_saw_are_written_as_a_text(held_out_texts, tmp_path):
    subprocess.run([sys.executable, SCRIPT, "--held-out", tmp_path], check=True, capture_output=True)
    assert sorted(load_text(tmp_path).documents) == sorted(filter(None, held_out_texts))
    assert len(held_out_texts) > 20
