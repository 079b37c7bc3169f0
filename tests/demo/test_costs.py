"""The costs of a pass, from a made-up log. test_scenario.py measures real passes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from devguard import transport
from devguard.demo.costs import Costs

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
PROCESSES = [
    {"devices": [{"index": 0, "context": True, "peak_bytes": 20}]},
    {"devices": [{"index": 0, "context": True, "peak_bytes": 10}, {"index": 1, "context": True, "peak_bytes": 5}]},
    {"devices": [{"index": 2, "context": False, "peak_bytes": 7}]},
]


def test_copies_are_counted_by_the_way_in_which_they_are_made(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("1 1 0 memcpy dst=-1 src=0 bytes=1000\n")  # before anything is measured
    costs = Costs([os.getpid()], str(log))
    for way, size in (("first", 10), ("second", 20)):
        with costs.measure(way), log.open("a") as file:
            file.write(f"1 1 0 memcpy dst=-1 src=0 bytes={size}\n1 1 0 memcpy dst=1 src=-1 bytes={2 * size}\n" * 2)
    found = costs.as_dict(PROCESSES, None)
    assert found["copies"] == {
        "first": {"down": 20, "up": 40, "across": 0},
        "second": {"down": 40, "up": 80, "across": 0},
    }
    assert (found["contexts"], found["gpu_0_peak"]) == (3, 30)


def test_the_memory_of_an_arena_counts_as_host_memory() -> None:
    with transport.Arena(budget="1MiB") as arena:
        costs = Costs([os.getpid()], None)
        with costs.measure("host"):
            handle = arena.put(bytes(100_000))
        without, found = costs.as_dict([], None), costs.as_dict([], arena)
        assert found["host_peak"] - without["host_peak"] == arena.usage().allocated == 1 << 20
        assert found["copies"] is None
        del handle
