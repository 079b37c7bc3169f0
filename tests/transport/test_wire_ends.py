"""The end of a connection: it is seen at once, it loses no word, and a forked child neither delays nor causes it."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from devguard.transport import wire
from devguard.transport.memory import Memory
from devguard.transport.wire import Channel, Kind
from tests.helpers.transport_children import run


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    one, other = (Channel(end) for end in socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    yield one, other
    one.close(), other.close()


def heard(channel: Channel) -> list[int]:
    """Return the numbers of all messages until the end of a connection."""
    numbers = []
    with pytest.raises(EOFError):
        for message in channel.receive():
            numbers.append(message.number)
    return numbers


def test_what_a_process_has_said_arrives_although_it_ended_with_unread_messages(ends: tuple[Channel, Channel]) -> None:
    ends[0].send(Kind.ACKNOWLEDGE, 7)
    ends[1].send(Kind.CLOSE, 1)  # for the kernel, the end is a reset then
    ends[0].close()
    assert heard(ends[1]) == [7]


def test_a_forked_copy_does_not_hide_that_a_connection_is_closed(ends: tuple[Channel, Channel]) -> None:
    copy = os.dup(ends[0].socket.fileno())  # as in a child that was forked
    ends[0].send(Kind.ACKNOWLEDGE, 7)
    ends[0].close()
    assert heard(ends[1]) == [7]
    os.close(copy)


def test_a_forked_child_that_closes_its_copy_ends_no_connection() -> None:
    assert (
        run("""
import socket
from devguard.transport.wire import Channel, Kind
one, other = (Channel(end) for end in socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
child = os.fork()
if child == 0:
    one.close()
    os._exit(0)
os.waitpid(child, 0)
one.send(Kind.OPEN, 3)
print([message.number for message in other.receive()])
""")
        == "[3]"
    )


def test_a_fork_while_another_thread_sends_does_not_block_the_child() -> None:
    assert (
        run("""
import socket
from devguard.transport.wire import Channel
one, other = (Channel(end) for end in socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
inside, over = threading.Event(), threading.Event()
def send():
    with one._lock:  # the system call of a send lets the other threads run
        inside.set()
        over.wait()
thread = threading.Thread(target=send)
thread.start()
inside.wait()
child = os.fork()
if child == 0:
    signal.alarm(20)
    one.close()
    os._exit(0)
print(os.waitpid(child, 0)[1])
over.set()
thread.join()
""")
        == "0"
    )


def test_while_too_many_descriptors_are_under_way_sending_waits_a_moment(
    ends: tuple[Channel, Channel], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []

    def refuse(*_: Any) -> None:
        raise OSError(errno.ETOOMANYREFS, "too many references")

    memory, _ = Memory.make(4096)
    with monkeypatch.context() as patch:
        patch.setattr(wire, "time", SimpleNamespace(sleep=waits.append))
        patch.setattr(wire.socket, "send_fds", refuse)
        assert not ends[0].send(Kind.SEGMENT, 1, 4096, memory=memory)
        assert waits == []  # a send never waits
        assert not ends[0].flush()
        assert waits == [wire.CROWDED_S]
    assert ends[0].flush()
    (message,) = ends[1].receive()
    assert message.number == 1
    os.close(message.descriptor)


def test_a_kernel_without_pidfd_has_channels_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "_SO_PEERPIDFD", 9999)
    monkeypatch.delattr(os, "pidfd_open")
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    channels = [Channel(end) for end in pair]
    assert [channel.pidfd for channel in channels] == [None, None]
    assert not channels[0].lacks_descriptor
    for channel in channels:
        channel.close()
