"""`make fuzz` runs more examples of every hypothesis test, also of those that name a number of their own."""

import re
from pathlib import Path

import pytest
from example_count import examples
from hypothesis import settings

TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize(("profile", "count", "same_every_time"), [("ropewalk", 7, True), ("fuzz", 70, False)])
def test_examples_by_profile(profile, count, same_every_time):
    before = settings.get_current_profile_name()
    settings.load_profile(profile)
    try:
        asked = examples(7)
        assert (asked.max_examples, asked.derandomize, asked.deadline) == (count, same_every_time, None)
        assert settings().max_examples == count / 7 * 50
    finally:
        settings.load_profile(before)


def test_no_test_names_a_number_that_profiles_cannot_change():
    files = [file for file in TESTS.rglob("test_*.py") if file != Path(__file__)]
    assert not [str(file) for file in files if re.search(r"max_examples=|derandomize=", file.read_text("utf-8"))]
