"""Which records of a log are shown, and in which order."""

from __future__ import annotations

import pytest

from devguard.errors import ConfigError
from devguard.logs.selection import SORTS, Selection, split_names
from tests.helpers.logs import process, site

SITES = [
    site(9, door="load", bytes=5, count=1, file="b.py"),
    site(10, door="ipc", bytes=7, count=3, file="a.py", action="repaired"),
    site(2, door="load", bytes=5, count=8, file="b.py"),
    site(0, door="native", bytes=0, count=2, file=""),
]


@pytest.mark.parametrize(
    ("sort", "lines"),
    [
        ("bytes", [10, 2, 9, 0]),
        ("count", [2, 10, 0, 9]),
        ("line", [10, 2, 9, 0]),
        ("door", [10, 2, 9, 0]),
        ("action", [2, 9, 0, 10]),
    ],
)
def test_records_are_sorted(sort: str, lines: list[int]) -> None:
    assert [each.line for each in Selection(sort=sort).pick(SITES)] == lines
    assert sort in SORTS


def test_doors_are_picked() -> None:
    assert [each.line for each in Selection(doors=("ipc", "native")).pick(SITES)] == [10, 0]


def test_ranks_are_picked_and_none_is_the_rank_of_a_process_without() -> None:
    processes = [process(rank="0"), process(rank="1"), process()]
    for ranks, expected in ((), [True] * 3), (("1",), [False, True, False]), (("none", "0"), [True, False, True]):
        assert [Selection(ranks=ranks).has_process(each) for each in processes] == expected


def test_a_door_or_a_rank_that_is_not_there_is_an_error_with_those_that_are() -> None:
    processes = [process(rank=str(rank)) for rank in (10, 2, 0)] + [process()]
    doors = ("load", "ipc")
    Selection(doors=("load", "native"), ranks=("10", "none")).check(processes, SITES, doors)
    with pytest.raises(ConfigError, match=r"^--door lod: there is no such door\. Valid: ipc, load, native\.$"):
        Selection(doors=("load", "lod")).check(processes, SITES, doors)
    with pytest.raises(ConfigError, match=r"^--rank 7: the log has no process with that rank\. Valid: 0, 2, 10, none"):
        Selection(ranks=("7",)).check(processes, SITES, doors)


def test_an_error_lists_only_so_many_names() -> None:
    processes = [process(rank=str(rank)) for rank in range(1000)]
    with pytest.raises(ConfigError, match=r"38, 39 and 960 more\.$"):
        Selection(ranks=("x",)).check(processes, [], ())


def test_names_are_repeated_or_separated_by_commas() -> None:
    assert split_names("--door", ["load, ipc", "ipc", ",native,"]) == ("load", "ipc", "native")
    assert split_names("--fail-on", ["kept"], ("strays", "kept")) == ("kept",)


def test_no_name_and_a_wrong_name_are_errors_with_the_valid_ones() -> None:
    with pytest.raises(ConfigError, match=r"--rank names nothing. Give one name"):
        split_names("--rank", [" , "])
    with pytest.raises(ConfigError, match=r"--fail-on names nothing.*Valid: strays, kept"):
        split_names("--fail-on", [""], ("strays", "kept"))
    with pytest.raises(ConfigError, match=r"--fail-on Kept: there is no such name. Valid: strays, kept"):
        split_names("--fail-on", ["kept,Kept"], ("strays", "kept"))
