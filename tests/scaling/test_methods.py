"""The table of methods."""

from __future__ import annotations

import dataclasses
import inspect
import re

import pytest

import ropewalk as rw
from ropewalk.scaling import METHODS, Scaler, parse


def test_every_method_is_listed_in_order() -> None:
    assert [method.name for method in rw.scalers()] == list(METHODS)


def test_a_listed_method_has_the_fields_of_a_spec() -> None:
    listed = {method.name: method for method in rw.scalers()}
    assert listed["yarn"].fields[:4] == ("factor", "beta_fast=32.0", "beta_slow=1.0", "truncate=true")
    assert listed["jet-long"].fields == ("near=2k", "step=None")
    assert listed["self-extend"].facet == "positions"
    assert listed["none"].facet is None
    for method in listed.values():
        required = [field for field in method.fields if "=" not in field]
        pairs = "/".join(["1"] * 4)
        values = ",".join(f"{field}={pairs if field in ('short', 'long') else 8}" for field in required)
        assert parse(f"{method.name}:{values}").name == method.name


def test_the_table_prints_one_line_a_method() -> None:
    lines = str(rw.scalers()).splitlines()
    assert len(lines) == len(METHODS)
    assert all(len(line) <= 145 for line in lines)
    yarn = next(line for line in lines if line.startswith("yarn:factor "))
    assert "frequencies" in yarn and "cos and sin" in yarn
    assert repr(rw.scalers()) == str(rw.scalers())


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_documented_and_a_frozen_value(name: str) -> None:
    method = METHODS[name]
    assert method.name == name
    doc = inspect.getdoc(method)
    assert doc is not None
    if method is not Scaler:
        assert any(source.strip() in doc for source in re.split("[;,]| section", method.source)), method.source
    assert dataclasses.is_dataclass(method)
    assert method.__dataclass_params__.frozen  # type: ignore[attr-defined]
    documented = set(re.findall(r"^\s+(\w+): ", doc, flags=re.MULTILINE))
    fields = {field.name for field in dataclasses.fields(method)}
    assert fields - {"factor"} <= documented
    assert all(field.kw_only for field in dataclasses.fields(method))
