"""Samples of arenas, which may hold anything."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from devguard import transport
from devguard.watch.metrics import arenas

SAMPLE: dict[str, Any] = {
    "kind": "cpu",
    "address": "a1",
    "in_use": 1,
    "budget": 2,
    "peak": 3,
    "leases": 4,
    "put_bytes": 5,
    "deaths": 6,
    "cancelled": 7,
    "wait_seconds": 8.5,
    "waiting": 0,
    "waiting_since": None,
    "release_seconds": {"bounds": [0.1, 1.0], "counts": [1, 3, 4], "sum": 9.5},
}


def test_what_an_arena_samples_can_be_read() -> None:
    with transport.Arena(budget="1MiB") as arena:
        handle = arena.put(bytes(300_000))
        found = arenas.read(json.loads(json.dumps(arena.sample())))
        assert found is not None
        assert (found.kind, found.address, found.budget) == ("cpu", arena.address, 1 << 20)
        assert (found.in_use, found.leases, found.put_bytes) == (arena.usage().in_use, 1, handle.nbytes)
        assert (len(found.counts), found.counts[-1]) == (len(found.bounds) + 1, 0)


def test_a_put_that_waits_is_in_the_time_waited() -> None:
    found = arenas.read({**SAMPLE, "waiting": 2, "waiting_since": 100.0})
    assert found is not None
    assert (found.waited(103.0), found.waited(99.0)) == (14.5, 8.5)
    idle = arenas.read(SAMPLE)
    assert idle is not None
    assert idle.waited(time.time()) == 8.5


@pytest.mark.parametrize(
    "change",
    [
        {"kind": 1},
        {"in_use": -1},
        {"put_bytes": "5"},
        {"deaths": True},
        {"wait_seconds": None},
        {"waiting": 1},
        {"release_seconds": None},
        {"release_seconds": []},
        {"release_seconds": {"bounds": "x", "counts": [0], "sum": 0}},
        {"release_seconds": {"bounds": [0.1], "counts": [0], "sum": 0}},
        {"release_seconds": {"bounds": [0.1, 0.1], "counts": [0, 0, 0], "sum": 0}},
        {"release_seconds": {"bounds": [0.1], "counts": [2, 1], "sum": 0}},
        {"release_seconds": {"bounds": [0.1], "counts": [1, 2], "sum": -1}},
        {"release_seconds": {"bounds": [i / 10 for i in range(99)], "counts": [0] * 100, "sum": 0}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_sample_of_another_form_is_left_out(change: dict[str, Any]) -> None:
    assert arenas.read(SAMPLE) is not None
    assert arenas.read({**SAMPLE, **change}) is None
    assert arenas.read({}) is None


def test_numbers_are_used_again() -> None:
    numbers = arenas.Numbers()
    numbers.update(["a", "b", "c"])
    assert [numbers[address] for address in "abc"] == [1, 2, 3]
    numbers.update(["c", "d"])
    assert [numbers[address] for address in "cd"] == [3, 1]
    numbers.update([])
    numbers.update(["e"])
    assert numbers["e"] == 1
