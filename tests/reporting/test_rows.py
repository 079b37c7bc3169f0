"""Rows of the journal, and the tallies in which threads count without a lock."""

from __future__ import annotations

import threading

import pytest

import devguard
from devguard.ownership import in_force
from devguard.ownership.stack import Stack
from devguard.reporting import rows, verdict
from devguard.reporting.journal import journal

pytestmark = pytest.mark.usefixtures("clean")


def stray(nbytes: int = 8, door: str = "load") -> bool:
    """Judge a stray at one call site, for the owner in force."""
    owner = in_force.owner()
    assert owner is not None
    return verdict.judge(door, "cuda:3", owner, nbytes, "Do not.", target=owner.tag)


def test_the_tallies_of_ended_threads_are_folded_into_the_row() -> None:
    def work() -> None:
        for _ in range(3):
            with devguard.guard("cpu"):
                stray(), stray()

    addresses = []
    for _ in range(200):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        addresses.append(Stack())  # so that no thread's stack reuses the address of an earlier one
    (row,) = [row for row in journal._rows.values() if row.key[2] != "threads"]
    assert row.total() == (200 * 3 * 2, 200 * 3 * 2 * 8)
    assert len(row.tallies) <= rows.ROOM
    assert journal.total == 200 * 3 * 2


def test_the_tally_of_a_running_thread_is_not_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "ROOM", 2)
    go = threading.Barrier(9)

    def work() -> None:
        with devguard.guard("cpu"):
            for _ in range(20):
                stray()
                go.wait()

    threads = [threading.Thread(target=work) for _ in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (row,) = [row for row in journal._rows.values() if row.key[2] != "threads"]
    assert row.total() == (9 * 20, 9 * 20 * 8)
