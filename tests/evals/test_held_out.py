"""The files of the README's table on the small model: written by `tests/train_tiny.py --held-out`."""

from pathlib import Path

from prepared import python

from ropewalk.evals.data import load_text

SCRIPT = Path(__file__).parents[1] / "train_tiny.py"


def test_the_files_that_the_small_model_never_saw_are_written_as_a_text(held_out_texts, tmp_path):
    python(SCRIPT, "--held-out", tmp_path).check_returncode()
    assert sorted(load_text(tmp_path).documents) == sorted(filter(None, held_out_texts))
    assert len(held_out_texts) > 20
