"""Fixtures that more than one file of engine tests uses."""

import pytest
from families import FAMILIES


@pytest.fixture(scope="module")
def llama():
    return FAMILIES["llama"]()


@pytest.fixture(scope="module")
def llama64():
    return FAMILIES["llama"]().double()
