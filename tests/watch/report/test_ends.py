"""The ends that processes could not write themselves."""

from __future__ import annotations

from pathlib import Path

import pytest

from devguard.watch.report.ends import find_ends
from devguard.watch.report.run import read
from tests.helpers.journals import START, Log


def ends(folder: Path) -> dict[int, float]:
    return {place: time - START for place, time in find_ends([t.journal for t in read(folder).tracks]).items()}


def test_a_parent_notes_the_end_of_its_child(tmp_path: Path) -> None:
    parent = Log(tmp_path, 1)
    Log(tmp_path, 2, 1.0)
    Log(tmp_path, 3, 1.0)
    parent.child(5.0, 3)
    assert ends(tmp_path) == {2: 5.0}


@pytest.mark.parametrize("other", [{"host": "there"}, {"pid_space": "another"}])
def test_a_process_of_another_machine_or_container_has_its_own_numbers(tmp_path: Path, other: dict[str, str]) -> None:
    Log(tmp_path, 1).child(5.0, 3)
    Log(tmp_path, 3, 1.0, **other)
    assert ends(tmp_path) == {}


def test_a_child_that_began_after_the_end_had_the_number_later(tmp_path: Path) -> None:
    parent = Log(tmp_path, 1)
    Log(tmp_path, 3, 1.0)
    (tmp_path / "here-3-1.jsonl").rename(tmp_path / "first.jsonl")
    Log(tmp_path, 3, 8.0)
    parent.child(5.0, 3)
    parent.child(9.0, 3)
    assert ends(tmp_path) == {1: 5.0, 2: 9.0}


def test_a_process_that_became_another_program_ended_when_that_began(tmp_path: Path) -> None:
    Log(tmp_path, 3, 1.0)
    (tmp_path / "here-3-1.jsonl").rename(tmp_path / "first.jsonl")
    Log(tmp_path, 3, 4.0)
    assert ends(tmp_path) == {0: 4.0}
