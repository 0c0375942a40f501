"""Every RoPE architecture of transformers, built small: served exactly, or refused for a written reason."""

from pathlib import Path

import pytest
from families import FAMILIES
from serving import bands, frequencies

DOCS = Path(__file__).parents[2] / "docs" / "families.md"


@pytest.mark.parametrize("name", FAMILIES)
def test_family_is_served_or_refused_as_the_docs_say(name):
    row = f"| {name} | {frequencies(name, FAMILIES[name]())} | {bands(name, FAMILIES[name]())} |"
    assert row in DOCS.read_text(encoding="utf-8").splitlines(), f"{row}\nrun: python docs/generate.py --families"


def test_at_least_forty_architectures_are_served():
    rows = [line for line in DOCS.read_text(encoding="utf-8").splitlines() if line.endswith("| served | served |")]
    assert len(rows) >= 40
