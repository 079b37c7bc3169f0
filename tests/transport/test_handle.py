"""Handles: small, picklable, and named in messages."""

from __future__ import annotations

import copy
import pickle

import pytest

from devguard.errors import DevGuardError, PeerGone
from devguard.transport import Arena, Handle


def test_a_handle_is_small_and_says_what_it_stands_for(arena: Arena) -> None:
    handle = arena.put(bytes(1 << 20), to=["tp0", "tp1"])
    again = pickle.loads(pickle.dumps(handle))
    assert len(pickle.dumps(handle)) < 400
    for one in (handle, again, copy.copy(handle)):
        assert (one.address, one.number, one.readers) == (arena.address, handle.number, ("tp0", "tp1"))
        assert f"lease {handle.number} (1," in str(one)
        assert "test_handle.py:" in one.site
        assert str(one) in repr(one)
    handle.cancel()


def test_a_handle_of_no_arena_is_refused_by_each_verb() -> None:
    handle = Handle("devguard-transport-none", 1, 1, 0, 1, 0, 100_000, None, "a.py:1")
    for verb in (handle.get, lambda: handle.view().__enter__()):
        with pytest.raises(PeerGone, match="No arena listens"):
            verb()
    handle.skip()  # its part is over anyway
    with pytest.raises(DevGuardError, match="Only the process that has put"):
        handle.cancel()


def test_a_pickled_handle_does_not_end_its_lease_when_it_is_collected(arena: Arena) -> None:
    message = pickle.dumps(arena.put(bytes(1 << 20)))
    assert len(pickle.loads(message).get()) == 1 << 20
