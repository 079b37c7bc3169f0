"""What the processes of a folder have counted, from logs that grow."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from devguard.support import process_identity
from devguard.watch.folder import Folder
from devguard.watch.metrics.counters import Counters
from tests.logs.test_reader import row
from tests.watch.metrics.test_arenas import SAMPLE
from tests.watch.test_folder import STATE, Writer

PID = os.getpid()
STRAYS = "devguard_strays_total"
WAITED = "devguard_transport_wait_seconds_total"
PUT = "devguard_transport_put_bytes_total"


def running(folder: Path, pid: int = PID, **first: Any) -> Writer:
    """Return the log of a process that runs: this one, unless another is named."""
    return Writer(folder, pid, started=process_identity.started(pid), pid_space=process_identity.pid_space(), **first)


def arena(address: str = "a1", **changes: Any) -> dict[str, Any]:
    return {**SAMPLE, "address": address, **changes}


def test_strays_are_summed_by_door_action_device_and_owner(tmp_path: Path) -> None:
    counters, folder = Counters(), Folder(tmp_path)
    for pid in (1, 2):
        Writer(tmp_path, pid).row(0, 3 * pid)
    counters.update(folder.update(), 9.0)
    known = {**row(1), "source": "cuda:2", "owner": "cuda:1", "count": 2, "bytes": 5}
    Writer(tmp_path, 3).line(known)
    counters.update(folder.update(), 9.0)
    without, named = ("load", "repaired", "cuda:0", ""), ("load", "repaired", "cuda:2", "cuda:1")
    assert counters.sums[STRAYS].totals == {without: 9, named: 2}
    assert counters.sums["devguard_stray_bytes_total"].totals == {without: 72, named: 5}


def test_what_a_process_has_counted_stays_when_it_has_ended(tmp_path: Path) -> None:
    counters, folder = Counters(), Folder(tmp_path)
    writer = running(tmp_path)
    writer.row(0, 3)
    writer.sample(7.0, 2, arenas=[arena()])
    assert len(counters.update(folder.update(), 9.0)) == 1
    writer.grow(0, 4)
    writer.line({"end": {**STATE, "time": 8.0}})
    assert counters.update(folder.update(), 10.0) == []
    assert [*counters.sums[STRAYS].totals.values()] == [4]
    assert counters.sums[PUT].totals == {("serve", "cpu"): 5}
    (release,) = counters.releases()
    assert release == (("serve", "cpu"), [("0.1", 1), ("1.0", 3), ("+Inf", 4)], 9.5)


@pytest.mark.parametrize("action", ["placed", "kept"])
def test_what_is_no_stray_is_not_counted(tmp_path: Path, action: str) -> None:
    writer, counters = Writer(tmp_path), Counters()
    writer.row(0, 1)
    writer.path.write_bytes(writer.path.read_bytes().replace(b'"repaired"', f'"{action}"'.encode()))
    counters.update(Folder(tmp_path).update(), 9.0)
    assert counters.sums[STRAYS].totals == {}


def test_two_arenas_of_a_process_are_told_apart_and_a_later_one_takes_the_place_of_one_that_is_closed(
    tmp_path: Path,
) -> None:
    counters, folder, writer = Counters(), Folder(tmp_path), running(tmp_path, RANK="3")
    writer.sample(7.0, 2, arenas=[arena("a1"), arena("a2", in_use=9)])
    writer.sample(8.0, 2, arenas=[arena("a2", put_bytes=6), arena("a3", put_bytes=100)])
    found = counters.update(folder.update(), 9.0)
    assert [(labels, one.address) for labels, one in found] == [
        (("rank 3 serve 2", "cpu"), "a2"),
        (("rank 3 serve", "cpu"), "a3"),
    ]
    assert counters.sums[PUT].totals == {("rank 3 serve", "cpu"): 105, ("rank 3 serve 2", "cpu"): 6}
    assert counters.update(folder.update(), 9.0) == found  # nothing new
    assert counters.sums[PUT].totals == {("rank 3 serve", "cpu"): 105, ("rank 3 serve 2", "cpu"): 6}


def test_a_put_that_waits_grows_the_counter_and_its_end_does_not_shrink_it(tmp_path: Path) -> None:
    counters, folder, writer = Counters(), Folder(tmp_path), running(tmp_path)
    writer.sample(7.0, 2, arenas=[arena(waiting=1, waiting_since=90.0)])
    waited = []
    for now in (100.0, 101.0):
        counters.update(folder.update(), now)
        waited += counters.sums[WAITED].totals.values()
    writer.sample(8.0, 2, arenas=[arena(wait_seconds=18.9)])  # it ended 0.6 s before the last look
    counters.update(folder.update(), 102.0)
    waited += counters.sums[WAITED].totals.values()
    assert waited == [18.5, 19.5, 19.5]


def test_releases_with_other_bounds_are_left_out(tmp_path: Path) -> None:
    counters = Counters()
    other = {"bounds": [0.2], "counts": [1, 1], "sum": 0.1}
    for pid, release in ((1, SAMPLE["release_seconds"]), (2, other)):
        Writer(tmp_path, pid).sample(7.0, 2, arenas=[arena(f"a{pid}", release_seconds=release)])
    counters.update(Folder(tmp_path).update(), 9.0)
    (release,) = counters.releases()
    assert release[1:] == ([("0.1", 1), ("1.0", 3), ("+Inf", 4)], 9.5)
    assert counters.sums[PUT].totals == {("serve", "cpu"): 10}
