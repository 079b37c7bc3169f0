"""Who may receive memory of other processes: what decides whether the door ``ipc`` has to look at all."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from devguard.doors.arrivals.ipc_memory import Receivers
from devguard.ownership.owner import CPU, Owner, owner_of_index
from devguard.ownership.process import on_owner, process

HOST, ONE, TWO = CPU, owner_of_index(1), owner_of_index(2)


@pytest.fixture
def receivers() -> Iterator[Receivers]:
    mine = Receivers()
    on_owner.append(mine.give)
    yield mine
    process.own(None)
    on_owner.remove(mine.give)


def test_there_is_none_before_anybody_was_entered(receivers: Receivers) -> None:
    assert (receivers.only, receivers.several) == (-1, False)


@pytest.mark.parametrize(
    ("entered", "only", "several"),
    [([ONE], 1, False), ([ONE, ONE], 1, False), ([ONE, TWO], -1, True), ([ONE, HOST], -1, False), ([HOST], -1, False)],
)
def test_those_that_were_entered(receivers: Receivers, entered: list[Owner], only: int, several: bool) -> None:
    for owner in entered:
        receivers.enter(owner)
    assert (receivers.only, receivers.several) == (only, several)


def test_that_of_the_process_counts_while_it_has_the_process(receivers: Receivers) -> None:
    process.own(ONE)
    assert receivers.only == 1
    process.own(TWO)
    assert receivers.only == 2
    receivers.enter(ONE)
    assert (receivers.only, receivers.several) == (-1, False)  # the process's was not entered
    process.own(None)
    assert receivers.only == 1


def test_while_the_process_changes_hands_both_count(receivers: Receivers) -> None:
    process.own(ONE)
    seen: list[int] = []

    def look(owner: Owner | None) -> None:
        seen.append(receivers.only)

    on_owner.append(look)
    try:
        process.own(TWO)
    finally:
        on_owner.remove(look)
    assert seen == [-1, 2]


def test_two_that_enter_at_once_are_two(receivers: Receivers) -> None:
    looked, go = threading.Event(), threading.Event()

    class Slow(set[int]):
        def __or__(self, other: Any) -> Any:
            indices = set(self) | other
            if not looked.is_set():
                looked.set()
                go.wait(0.5)  # the other one is let through only if there is no lock
            return indices

    receivers._entered = Slow()
    first = threading.Thread(target=receivers.enter, args=(ONE,))
    first.start()
    looked.wait()
    second = threading.Thread(target=lambda: (receivers.enter(TWO), go.set()))
    second.start()
    first.join()
    second.join()
    assert (receivers.only, receivers.several) == (-1, True)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_that_is_forked_as_somebody_enters_does_not_wait_for_ever(receivers: Receivers) -> None:
    inside, go = threading.Event(), threading.Event()

    def enter() -> None:
        with receivers._lock:
            inside.set()
            go.wait(10)
            receivers.enter(ONE)

    thread = threading.Thread(target=enter)
    thread.start()
    inside.wait()
    threading.Timer(0.1, go.set).start()
    pid = os.fork()
    if pid == 0:
        receivers.enter(TWO)
        os._exit(receivers.only != -1)
    thread.join()
    assert os.waitpid(pid, 0)[1] == 0
