"""Every RoPE architecture of transformers, built small: served exactly, or refused for a written reason."""

import pytest
from families import FAMILIES
from families_page import SERVED, read_families
from serving import bands, frequencies

VERDICTS = read_families()


@pytest.mark.parametrize("name", FAMILIES)
def test_family_is_served_or_refused_as_the_docs_say(name):
    model = FAMILIES[name]()
    verdict = frequencies(name, model), bands(name, model)
    assert VERDICTS.get(name) == verdict, "run: python docs/generate.py --families"


def test_the_page_names_every_family_and_no_other():
    assert set(VERDICTS) == set(FAMILIES)


def test_at_least_forty_architectures_are_served():
    assert sum(verdict == (SERVED, SERVED) for verdict in VERDICTS.values()) >= 40
