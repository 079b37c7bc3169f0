"""Readers that die or lose their name: their parts of all leases are over, and no word of theirs is lost."""

from __future__ import annotations

import os
import select
import signal

import pytest

from devguard.transport import Arena, wire
from devguard.transport.wire import VERSION, Channel, Kind, connect
from tests.helpers.transport_children import BOUND_S, await_that, encode, hear, started

LARGE = 1 << 20

HOLD = """
with handles[0].view() as value:
    {fork}
    print("inside")
    {stop}
    time.sleep(60)
"""
# As a library in C forks: the child keeps a copy of the socket, so that only the process's own end shows the death.
FORK = """import ctypes
    child = ctypes.PyDLL(None).fork()
    if child == 0:
        signal.alarm(20)
        time.sleep(60)
    print(child)"""


@pytest.mark.parametrize("size", [10, LARGE], ids=["inline", "segment"])
@pytest.mark.parametrize("case", ["alone", "stopped", "with a forked child"])
def test_the_leases_of_a_killed_reader_end(arena: Arena, size: int, case: str) -> None:
    handle = arena.put(bytes(size))
    code = HOLD.format(
        fork=FORK if case == "with a forked child" else "", stop="os.kill(os.getpid(), 19)" if case == "stopped" else ""
    )
    with started(code, encode(handle)) as reader:
        child = int(hear(reader)) if case == "with a forked child" else None
        assert hear(reader) == "inside"
        await_that(lambda: "process" in arena.usage().leases[0].waits_for[0])
        pidfd = os.pidfd_open(reader.pid)
        reader.kill()
        assert select.select([pidfd], [], [], BOUND_S)[0]  # the kernel's notice
        await_that(lambda: not arena.usage().leases)
        os.close(pidfd)
        if child is not None:
            os.kill(child, signal.SIGKILL)  # it has lived until now
    assert (arena.usage().in_use, arena.usage().allocated) == (0, 0)  # the segment is retired


def test_without_a_pidfd_the_end_of_the_socket_shows_a_death(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "_open_pidfd", lambda *_: None)
    with started(HOLD.format(fork="", stop=""), encode(arena.put(bytes(LARGE)))) as reader:
        assert hear(reader) == "inside"
        reader.kill()
        await_that(lambda: not arena.usage().leases)


def joined(arena: Arena, name: str) -> Channel:
    """Return a connection that has joined under a name."""
    channel = connect(arena.address)
    channel.send(Kind.JOIN, VERSION, text=name)
    await_that(lambda: any(name in reader for reader in arena.usage().readers))
    return channel


def test_what_a_reader_opens_before_it_loses_its_name_is_known(arena: Arena) -> None:
    handle = arena.put(bytes(LARGE))
    former, successor = joined(arena, "tp0"), connect(arena.address)
    with arena._lock:  # the arena hears the successor first
        successor.send(Kind.JOIN, VERSION, text="tp0")
        await_that(lambda: not arena._lock.acquire(blocking=False) or not arena._lock.release())
        former.send(Kind.OPEN, handle.number)
    await_that(lambda: not arena.usage().leases)
    assert arena.usage().allocated == 0  # the former one may still read, so that the segment holds no other payload
    former.close(), successor.close()


def test_a_reader_that_has_lost_its_name_opens_nothing(arena: Arena) -> None:
    former = joined(arena, "tp0")
    successor = joined(arena, "tp0")
    await_that(lambda: list(arena._ledger.names) == [2])
    former.send(Kind.OPEN, 1)
    assert former.is_broken
    former.close(), successor.close()
