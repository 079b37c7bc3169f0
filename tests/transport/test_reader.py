"""One reader: an arena that does not answer, refuses or speaks otherwise, and what a reader remembers."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from devguard.errors import PeerGone
from devguard.transport import Arena, join, reader
from devguard.transport.wire import Channel, Kind, listen


@pytest.fixture
def stranger() -> Iterator[Callable[[Callable[[Channel], object]], str]]:
    """Return a function that makes an arena of one answer, and returns its address."""
    made: list[tuple[socket.socket, threading.Thread]] = []
    kept: list[Channel] = []

    def make(answer: Callable[[Channel], object]) -> str:
        listening, address = listen()
        listening.setblocking(True)

        def serve() -> None:
            end, _ = listening.accept()
            kept.append(Channel(end))
            answer(kept[-1])

        thread = threading.Thread(target=serve)
        thread.start()
        made.append((listening, thread))
        return address

    yield make
    for listening, thread in made:
        thread.join()
        listening.close()
    for channel in kept:
        channel.close()


def test_an_arena_that_does_not_answer_is_told(stranger: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "WELCOME_S", 0.1)
    with pytest.raises(PeerGone, match=r"has not answered for 0\.1 s"):
        join(stranger(lambda channel: None))


def test_a_refusal_is_told(stranger: Callable[..., str]) -> None:
    with pytest.raises(PeerGone, match="refuses: you are another user"):
        join(stranger(lambda channel: channel.send(Kind.REFUSE, text="you are another user")))


def test_an_arena_that_ends_at_once_is_told(stranger: Callable[..., str]) -> None:
    with pytest.raises(PeerGone, match="has ended"):
        join(stranger(lambda channel: channel.close()))


def test_another_protocol_is_told(stranger: Callable[..., str]) -> None:
    with pytest.raises(PeerGone, match="version"):
        join(stranger(lambda channel: channel.socket.send(b"hello, I am something else entirely")))


def test_finished_leases_are_forgotten_when_they_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "SWEEP", 8)
    with Arena("cpu", budget="4MiB") as arena, join(arena.address) as one:
        kept = arena.put(b"kept", to=2)
        assert kept.get() == b"kept"
        for _ in range(100):
            assert arena.put(b"x").get() == b"x"
            while len(arena.usage().leases) > 1:  # the arena's thread ends it
                time.sleep(0.001)
        assert len(one._finished) < 60
        assert kept.number in one._finished
