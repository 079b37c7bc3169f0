"""The thread of an arena: readers that cannot be accepted, and puts that wait too long."""

from __future__ import annotations

import errno
import os
import socket
import time
from typing import Any

import pytest

from devguard.transport import Arena, join, server


def test_a_full_descriptor_table_is_told_once_and_accepting_goes_on(
    arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    failures = iter([errno.EMFILE, errno.ENFILE])

    class Full:
        def __init__(self, listening: socket.socket) -> None:
            self._listening = listening

        def accept(self) -> Any:
            for number in failures:
                raise OSError(number, os.strerror(number))
            return self._listening.accept()

        def __getattr__(self, name: str) -> Any:
            return getattr(self._listening, name)

    monkeypatch.setattr(server, "PAUSE", 0.05)
    monkeypatch.setattr(server, "warn_user", lambda text, at=None: told.append(text))
    monkeypatch.setattr(arena._server, "_listening", Full(arena._server._listening))
    with join(arena.address):
        assert len(arena.usage().readers) == 1
    assert 1 <= len(told) <= 2
    assert "ulimit -n" in told[0]


def test_a_connection_that_never_joins_holds_nothing(arena: Arena) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as end:
        end.connect("\0" + arena.address)
        assert arena.usage().readers == ()
        handle = arena.put(bytes(1 << 20))
        assert len(handle.get()) == 1 << 20
        end.send(b"nonsense")
        end.settimeout(20)
        assert end.recv(100) == b""  # it is closed


def test_idle_memory_goes_back(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("devguard.transport.ledger.IDLE", 0.05)
    assert len(arena.put(bytes(1 << 20)).get()) == 1 << 20
    deadline = time.monotonic() + 20
    while arena.usage().allocated:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert len(arena.put(bytes(1 << 20)).get()) == 1 << 20
