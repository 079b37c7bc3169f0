"""Messages between an arena and a reader: none waits, none is lost, and strangers are refused."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from devguard.errors import PeerGone
from devguard.transport import wire
from devguard.transport.memory import Memory
from devguard.transport.wire import Channel, Kind, Message, connect, listen, refuse_user


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    channels = Channel(one), Channel(other)
    yield channels
    for channel in channels:
        channel.close()


def test_a_message_arrives_as_it_was_sent(ends: tuple[Channel, Channel]) -> None:
    memory, writable = Memory.make(4096)
    writable.buffer()[:3] = b"abc"
    ends[0].send(Kind.SEGMENT, 2**63, 4096, text="tp0 \udc80", memory=memory)
    (message,) = ends[1].receive()
    assert message[:4] == (Kind.SEGMENT, 2**63, 4096, "tp0 \udc80")
    assert not os.get_inheritable(message.descriptor)
    assert bytes(Memory(message.descriptor, 4096).map().buffer(0, 3)) == b"abc"


def test_a_full_socket_keeps_messages_in_their_order_and_blocks_nobody(ends: tuple[Channel, Channel]) -> None:
    memory, _ = Memory.make(4096)
    sent = [ends[0].send(Kind.SEGMENT, number, memory=memory) for number in range(2000)]
    assert not all(sent)
    arrived: list[Message] = []
    while not ends[0].flush() or len(arrived) < len(sent):
        for message in ends[1].receive():
            os.close(message.descriptor)
            arrived.append(message)
    assert [message.number for message in arrived] == list(range(2000))


def test_the_end_of_the_other_side_is_told_after_what_it_said(ends: tuple[Channel, Channel]) -> None:
    ends[0].send(Kind.ACKNOWLEDGE, 7)
    ends[0].close()
    arriving = ends[1].receive()
    assert next(arriving).number == 7
    with pytest.raises(EOFError):
        next(arriving)
    assert ends[1].send(Kind.CLOSE, 1)  # to nobody


@pytest.mark.parametrize("data", [b"x", b"\0" * 40, b"\xff" * 32], ids=["one byte", "zeros", "ones"])
def test_other_bytes_are_refused(ends: tuple[Channel, Channel], data: bytes) -> None:
    ends[0].socket.send(data)
    with pytest.raises(PeerGone, match="version"):
        list(ends[1].receive())


def test_both_sides_know_each_other() -> None:
    listening, address = listen()
    channel = connect(address)
    end, _ = listening.accept()
    other = Channel(end)
    assert (channel.pid, other.pid, channel.uid) == (os.getpid(), os.getpid(), os.geteuid())
    assert channel.pidfd is not None
    channel.close(), other.close(), listening.close()


def test_another_user_is_refused(ends: tuple[Channel, Channel], monkeypatch: pytest.MonkeyPatch) -> None:
    assert refuse_user(ends[0]) == ""
    monkeypatch.setattr(wire.os, "geteuid", lambda: 12345)
    assert "user 12345" in refuse_user(ends[0])


def test_an_address_without_an_arena_is_told() -> None:
    with pytest.raises(PeerGone, match="network namespace"):
        connect("devguard-transport-nobody")
