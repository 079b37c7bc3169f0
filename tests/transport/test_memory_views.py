"""Memory that readers view: what they write stays with them, and pages are not mapped again for each view."""

from __future__ import annotations

import os
import resource

import pytest

from devguard.transport import memory
from devguard.transport.memory import Mapping, Memory

SIZE = 8 << 20
HALF = SIZE // 2


@pytest.fixture
def made() -> tuple[Memory, Mapping]:
    return Memory.make(SIZE)


def fill(mapping: Mapping, value: int, offset: int = 0, nbytes: int = SIZE) -> None:
    mapping.buffer(offset, nbytes)[:] = bytes([value]) * nbytes


def faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def look(ours: Memory, offset: int, nbytes: int) -> memoryview:
    return ours.view(offset, nbytes)[0]


def address_of(view: memoryview) -> int:
    return memory.ctypes.addressof(view.obj)


def test_a_view_shows_what_the_memory_holds_and_keeps_what_is_written_to_it(made):
    ours, mapping = made
    fill(mapping, 1)
    view = look(ours, 0, SIZE)
    view[5000] = 9
    assert (view[5000], view[4095], mapping.buffer()[5000]) == (9, 1, 1)


@pytest.mark.parametrize(("first", "count"), [(0, 1), (SIZE - 1, 1), (HALF - 1, 2), (0, SIZE)])
def test_a_view_does_not_see_what_an_earlier_one_has_written(made, first, count):
    ours, mapping = made
    for value in (1, 2, 3):
        fill(mapping, value)
        view = look(ours, 0, SIZE)
        address = address_of(view)
        assert bytes(view) == bytes([value]) * SIZE
        view[first : first + count] = b"x" * count
        del view
        again = look(ours, 0, SIZE)
        assert address_of(again) == address  # the same pages: else this test shows nothing
        assert bytes(again) == bytes([value]) * SIZE
        del again


def test_a_buffer_that_outlives_its_view_cannot_reach_a_later_one(made):
    ours, mapping = made
    fill(mapping, 1)
    old = look(ours, 4096, HALF)[100:200]
    new = look(ours, 0, SIZE)
    old[:] = b"x" * 100
    assert bytes(new) == b"\1" * SIZE
    del old
    fill(mapping, 2)
    assert bytes(look(ours, 4096, HALF)) == b"\2" * HALF


def test_views_of_different_ranges_do_not_drop_what_the_others_have_written(made):
    ours, mapping = made
    fill(mapping, 1)
    one, other = look(ours, 0, HALF), look(ours, HALF, HALF)
    one[:] = b"o" * HALF
    other[:] = b"x" * HALF
    del one
    assert bytes(other) == b"x" * HALF
    assert bytes(look(ours, 0, HALF)) == b"\1" * HALF


def test_where_the_system_does_not_tell_written_pages_they_are_dropped_all_the_same(made, monkeypatch):
    def refuse(*_: object) -> int:
        raise PermissionError

    ours, mapping = made
    fill(mapping, 1)
    view = look(ours, 0, SIZE)
    view[7] = 9
    monkeypatch.setattr(memory.os, "open", refuse)
    del view
    assert bytes(look(ours, 0, SIZE)) == b"\1" * SIZE


def test_a_forked_child_drops_its_own_writes(made):
    ours, mapping = made
    fill(mapping, 1)
    view = look(ours, 0, SIZE)
    assert bytes(view) == b"\1" * SIZE
    child = os.fork()
    if child == 0:
        view[7] = 9
        del view
        os._exit(0 if bytes(look(ours, 0, SIZE)) == b"\1" * SIZE else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_pages_are_not_mapped_again_for_a_view_of_a_range_that_was_viewed_before(made):
    ours, mapping = made
    fill(mapping, 1)
    target = bytearray(SIZE)

    def count() -> int:
        before = faults()
        target[:] = look(ours, 0, SIZE)
        return faults() - before

    first = count()
    assert first > 100
    assert min(count() for _ in range(5)) < 10


def test_the_memory_goes_with_its_last_view():
    ours, mapping = Memory.make(SIZE)
    fill(mapping, 1)
    inode = str(os.fstat(ours.descriptor).st_ino)

    def maps() -> int:
        with open("/proc/self/maps") as lines:
            return sum("devguard-transport" in line and f" {inode} " in line for line in lines)

    view = look(ours, 0, SIZE)
    assert maps() == 2
    del ours, mapping
    assert maps() == 1
    del view
    assert maps() == 0


@pytest.mark.parametrize("alone", [True, False], ids=["used again", "mapped again"])
def test_a_use_ends_with_the_last_buffer_and_its_range_is_free_by_then(made, alone):
    ours, _ = made
    other = None if alone else look(ours, 0, SIZE)
    seen: list[bytes] = []
    view, use = ours.view(0, SIZE)
    view[9] = 9
    part = view[100:200]
    use.at_end = lambda: seen.append(bytes(look(ours, 0, SIZE)[:10]))
    del use, view
    assert not seen
    del part
    assert seen == [bytes(10)]
    assert other is None or bytes(other[:10]) == bytes(10)
