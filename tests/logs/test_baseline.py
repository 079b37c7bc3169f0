"""What a baseline knows of a changed program, and what is new."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devguard.logs.baseline import Baseline, Entry
from devguard.logs.reader import Merged
from tests.helpers.logs import ROOT, site


def baseline(*sites: Merged) -> Baseline:
    return Baseline.of(sites, ROOT, Baseline())


def new_lines(known: Sequence[int], found: Sequence[int]) -> list[int]:
    new, _ = baseline(*map(site, known)).compare([site(line) for line in found], ROOT)
    return [each.line for each in new]


SAME = {
    "as it was": site(),
    "a line that moved": site(57),
    "more strays": site(count=500, bytes=1 << 40),
    "other GPUs and ranks": site(devices=["cuda:3", "cuda:5"], owners=["cuda:3", "cuda:5"], ranks=["3"], processes=[8]),
    "another note": site(note="a note", via="zmq"),
    "another folder of the program": site(file="serve.py"),
}
CHANGED = {
    "another door": site(door="ipc"),
    "another action": site(action="repaired"),
    "another function": site(function="send"),
    "another file": site(file=f"{ROOT}/other.py"),
    "an owner of another kind": site(owners=["cpu"]),
    "an owner of another kind too": site(owners=["cuda:1", "cpu"]),
    "no line": site(0, file="", function=""),
}


@pytest.mark.parametrize("change", SAME)
def test_a_stray_stays_known(change: str) -> None:
    assert baseline(site()).compare([SAME[change]], ROOT) == ([], [])


@pytest.mark.parametrize("change", CHANGED)
def test_another_stray_is_new(change: str) -> None:
    new, vanished = baseline(site()).compare([CHANGED[change], site()], ROOT)
    assert new == [CHANGED[change]]
    assert vanished == []


def test_an_installed_library_is_the_same_in_another_environment() -> None:
    one, other = (site(file=f"{where}/site-packages/zmq/sugar.py") for where in ("/a/lib/python3.10", "/b/python3.13"))
    assert baseline(one).compare([other], ROOT) == ([], [])


@pytest.mark.parametrize(
    ("known", "found", "new"),
    [
        ([43], [43, 50], [50]),
        ([43], [40, 43], [40]),
        ([43], [45, 99], [99]),  # The nearest move is the likeliest.
        ([43, 50], [45, 52, 60], [60]),
        ([43, 50], [30, 45, 52], [30]),
        ([43, 50], [43, 60, 80], [80]),  # One moved, one is new.
        ([10, 20, 30], [15, 25, 27, 35], [27]),
        ([], [1, 2], [1, 2]),
        ([43, 50], [99], []),
        ([0], [0], []),
    ],
    ids=str,
)
def test_the_new_one_of_several_lines_in_a_function_is_named(
    known: list[int], found: list[int], new: list[int]
) -> None:
    assert new_lines(known, found) == new


LINES = st.lists(st.integers(0, 60), unique=True, max_size=8)


@given(LINES, LINES)
def test_as_many_lines_are_new_as_there_are_more(known: list[int], found: list[int]) -> None:
    new = new_lines(known, found)
    assert len(new) == max(0, len(found) - len(known))
    assert set(new) <= set(found)


@given(LINES, st.integers(0, 50), st.data())
def test_one_line_more_is_found_after_any_move_of_all(known: list[int], distance: int, data: st.DataObject) -> None:
    moved = [line + distance for line in known]
    added = data.draw(st.integers(200, 300))
    assert new_lines(known, [*moved, added]) == [added]


def test_a_journal_with_many_lines_in_one_function_is_compared_at_once() -> None:
    assert len(new_lines(range(0, 40_000, 2), range(1, 60_001, 2))) == 10_000


def test_strays_that_vanished_are_named_also_single_lines_of_a_function() -> None:
    known = baseline(site(43), site(50), site(function="send"), site(door="ipc", bytes=3))
    _, vanished = known.compare([site(51), site(door="ipc")], ROOT)
    assert [(each.entry.key.function, each.left) for each in vanished] == [("receive", 1), ("send", 0)]
    assert str(vanished[0].entry) == "load [observed], owner cuda, at serve.py:43,50 in receive"


def test_a_context_without_a_line_is_known_by_its_door() -> None:
    context = site(0, door="native", file="", function="")
    assert baseline(context).compare([context], ROOT) == ([], [])
    (entry,) = baseline(context).entries.values()
    assert str(entry) == "native [observed], owner cuda, at no line of user code"


def test_entries_with_one_key_become_one_and_reasons_are_kept() -> None:
    key = next(iter(baseline(site()).entries))
    merged = Baseline([Entry(key, (50,)), Entry(key, (43,), "because"), Entry(key, (50,), "later")])
    assert merged.entries == {key: Entry(key, (43, 50), "because")}
    assert Baseline.of([site(60)], ROOT, merged).entries == {key: Entry(key, (60,), "because")}
    assert Baseline.of([site(function="send")], ROOT, merged).entries.keys().isdisjoint({key})


def test_a_log_that_names_no_owner_has_a_baseline_too() -> None:
    old = site(owners=[])
    assert baseline(old).compare([old], ROOT) == ([], [])
