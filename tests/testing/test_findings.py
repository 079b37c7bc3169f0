"""Findings about one test, as data and as text."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from devguard import Site, Stray
from devguard.testing import findings
from devguard.testing.findings import Finding

ROOT = Path("/srv/project")
STRAY = Stray(
    door="load",
    source="cuda:0",
    target="cuda:1",
    owner="cuda:1",
    action="repaired",
    count=2,
    bytes=48,
    dtype=None,
    shape=None,
    pid=1,
    thread="MainThread",
    rank=None,
    time=0.0,
    site=Site("/srv/project/loader.py", 7, "load"),
    via="joblib",
    note="a note",
    stack=(),
)


def test_a_stray_becomes_a_finding_with_a_path_below_the_root() -> None:
    found = findings.from_stray(STRAY, ROOT)
    assert (found.kind, found.action, found.count, found.bytes) == ("load", "repaired", 2, 48)
    assert found.text == "cuda:0 -> cuda:1, owner cuda:1: repaired, via joblib (a note)"
    assert found.where == "loader.py:7 in load"
    assert "map_location" in found.advice


def test_a_path_outside_the_root_stays_absolute() -> None:
    assert findings.from_stray(STRAY, Path("/srv/pro")).where == "/srv/project/loader.py:7 in load"


def test_a_finding_survives_the_way_between_processes_as_plain_data() -> None:
    found = findings.from_stray(STRAY, ROOT)
    assert Finding(**found.as_dict()) == found


@pytest.mark.parametrize(("number", "more"), [(1, ""), (3, " (and 2 more)")])
def test_the_headline_names_the_place_of_the_first_finding(number: int, more: str) -> None:
    left = findings.left_behind("scope", "guard(1) was entered", "Exit it.", None, ROOT)
    found = [left] * number
    assert findings.headline(found) == f"no line of user code: scope: guard(1) was entered{more}"


def test_the_description_lists_each_advice_once() -> None:
    found = findings.from_stray(STRAY, ROOT)
    other = dataclasses.replace(found, where="loader.py:9 in load", bytes=0, count=1)
    lines = findings.describe([found, other]).splitlines()
    assert lines[0].startswith("load: cuda:0 -> cuda:1")
    assert lines[0].endswith("[2 x, 48 bytes]")
    assert lines[1] == "    at loader.py:7 in load"
    assert lines[2].endswith("[1 x]")
    assert [line for line in lines if line.startswith("To do: ")] == [f"To do: {found.advice}"]
