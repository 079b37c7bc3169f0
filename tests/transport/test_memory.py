"""Shared memory: sealed, seen by all maps, and freed with the last of them."""

from __future__ import annotations

import gc
import mmap
import os
from pathlib import Path

import pytest

from devguard.errors import DevGuardError
from devguard.transport.memory import Mapping, Memory


def test_readers_see_what_the_maker_writes_and_can_change_nothing() -> None:
    memory, writable = Memory.make(8192)
    writable.buffer()[4096:4099] = b"abc"
    private = memory.map_privately(4096, 4096)
    assert bytes(memory.map().buffer(4096, 3)) == b"abc"
    private.buffer()[:3] = b"xyz"
    assert bytes(memory.map().buffer(4096, 3)) == b"abc"
    with pytest.raises(PermissionError):
        os.ftruncate(memory.descriptor, 0)
    with pytest.raises(OSError, match="cannot map"):
        Mapping(memory.descriptor, 4096, 0, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED)


def test_a_map_lives_as_long_as_its_buffers() -> None:
    memory, writable = Memory.make(4096)
    view = writable.buffer(0, 4)
    del writable, memory
    view[:4] = b"abcd"
    assert bytes(view) == b"abcd"


def maps() -> int:
    return Path("/proc/self/maps").read_text().count("devguard-transport")


def test_memory_gives_its_descriptor_and_its_maps_back() -> None:
    gc.collect()
    before = len(os.listdir("/proc/self/fd")), maps()
    memory, writable = Memory.make(4096)
    buffer = writable.buffer()
    assert maps() == before[1] + 1
    del memory, writable, buffer
    assert (len(os.listdir("/proc/self/fd")), maps()) == before


def test_a_range_outside_is_refused() -> None:
    _, writable = Memory.make(4096)
    with pytest.raises(ValueError, match="do not lie"):
        writable.buffer(4000, 200)


def test_a_system_without_memfd_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    with pytest.raises(DevGuardError, match="Linux"):
        Memory.make(4096)
