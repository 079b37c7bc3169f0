"""Owners that may receive memory of other processes, from which the door ``ipc`` decides whether to check."""

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
    tracked = Receivers()
    on_owner.append(tracked.update)
    yield tracked
    process.own(None)
    on_owner.remove(tracked.update)


def test_there_is_no_receiver_before_an_owner_was_entered(receivers: Receivers) -> None:
    assert (receivers.only, receivers.several) == (-1, False)


@pytest.mark.parametrize(
    ("entered", "only", "several"),
    [([ONE], 1, False), ([ONE, ONE], 1, False), ([ONE, TWO], -1, True), ([ONE, HOST], -1, False), ([HOST], -1, False)],
)
def test_the_owners_that_were_entered_are_receivers(
    receivers: Receivers, entered: list[Owner], only: int, several: bool
) -> None:
    for owner in entered:
        receivers.add(owner)
    assert (receivers.only, receivers.several) == (only, several)


def test_the_owner_of_the_process_is_a_receiver_while_it_is_in_force(receivers: Receivers) -> None:
    process.own(ONE)
    assert receivers.only == 1
    process.own(TWO)
    assert receivers.only == 2
    receivers.add(ONE)
    assert (receivers.only, receivers.several) == (-1, False)  # the process owns another device, which was not entered
    process.own(None)
    assert receivers.only == 1


def test_both_owners_are_receivers_while_the_process_changes_its_owner(receivers: Receivers) -> None:
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


def test_two_threads_that_enter_at_the_same_time_are_both_recorded(receivers: Receivers) -> None:
    looked, go = threading.Event(), threading.Event()

    class Slow(set[int]):
        def __or__(self, other: Any) -> Any:
            indices = set(self) | other
            if not looked.is_set():
                looked.set()
                go.wait(0.5)  # the other thread sets it early only if there is no lock
            return indices

    receivers._entered = Slow()
    first = threading.Thread(target=receivers.add, args=(ONE,))
    first.start()
    looked.wait()
    second = threading.Thread(target=lambda: (receivers.add(TWO), go.set()))
    second.start()
    first.join()
    second.join()
    assert (receivers.only, receivers.several) == (-1, True)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_child_forked_while_a_thread_enters_does_not_block(receivers: Receivers) -> None:
    inside, go = threading.Event(), threading.Event()

    def enter() -> None:
        with receivers._lock:
            inside.set()
            go.wait(10)
            receivers.add(ONE)

    thread = threading.Thread(target=enter)
    thread.start()
    inside.wait()
    threading.Timer(0.1, go.set).start()
    pid = os.fork()
    if pid == 0:
        receivers.add(TWO)
        os._exit(receivers.only != -1)
    thread.join()
    assert os.waitpid(pid, 0)[1] == 0
