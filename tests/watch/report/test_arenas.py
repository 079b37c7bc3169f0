"""The arenas of devguard.transport, as their processes sampled them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from devguard.transport import totals
from devguard.watch.report.arenas import ArenaUse, quantile
from devguard.watch.report.run import read
from tests.helpers.journals import Log


def test_each_arena_has_its_newest_sample_and_the_most_of_each_number(tmp_path: Path) -> None:
    log = Log(tmp_path, 1)
    log.state(1.0, "cpu", [])
    log.sample(2.0, {}, arenas=[{"address": "a", "in_use": 5, "waiting": 3}, {"address": "b", "in_use": 1}])
    log.sample(3.0, {}, arenas=[{"address": "b", "in_use": 2, "waiting": True}, {"in_use": 9}])
    found = {arena.last.get("address"): arena for arena in read(tmp_path).arenas}
    assert [found[name].number("in_use") for name in ("a", "b", None)] == [5, 2, 9]
    assert found["a"].most == {"in_use": 5, "waiting": 3}
    assert found["b"].most == {"in_use": 2}  # True is no number
    assert found["b"].number("waiting") is None


def test_the_time_below_which_a_part_of_the_leases_ended() -> None:
    counted = totals.Totals()
    for seconds in [0.0004] * 50 + [0.002] * 48 + [0.3, 1000.0]:
        counted.note_release(seconds)
    arena = ArenaUse(0, counted.as_dict(), {})
    assert [quantile(arena, part) for part in (0.5, 0.51, 0.98, 0.99, 1.0)] == [0.0005, 0.0025, 0.0025, 0.5, math.inf]


@pytest.mark.parametrize(
    "times",
    [
        None,
        7,
        {},
        {"bounds": [1], "counts": "x"},
        {"bounds": [1.0], "counts": []},
        {"bounds": [1.0], "counts": [0, 0]},
        {"bounds": ["x"], "counts": [0, 1]},
        {"bounds": [1.0], "counts": [1]},
        {"bounds": [1.0], "counts": [1, -1]},
    ],
    ids=str,
)
def test_without_times_of_that_form_there_is_none(times: Any) -> None:
    assert quantile(ArenaUse(0, {"release_seconds": times}, {}), 0.5) is None
