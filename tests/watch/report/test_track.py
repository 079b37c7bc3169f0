"""What one process held over time."""

from __future__ import annotations

from pathlib import Path

import pytest

from devguard.watch.report.run import read
from devguard.watch.report.track import Track
from tests.helpers.journals import MIB, START, Log


def track(folder: Path) -> Track:
    return read(folder).tracks[0]


def shown(found: Track, time: float) -> dict[str, tuple[str, int | None]]:
    return {uuid: (cell.verdict, cell.bytes) for uuid, cell in found.cells(START + time).items()}


def test_a_process_holds_what_it_last_wrote(tmp_path: Path) -> None:
    log = Log(tmp_path, 1)
    log.state(1.0, None, ["cuda:0"])
    log.state(2.0, "cuda:1", ["cuda:0", "cuda:1"])
    log.sample(3.0, {"cuda:0": 0, "cuda:1": 5 * MIB})
    log.sample(4.0, {"cuda:0": MIB, "cuda:1": 6 * MIB})
    log.sample(5.0, {"cuda:0": 2 * MIB, "cuda:1": 6 * MIB})
    log.end(6.0)
    found = track(tmp_path)
    assert shown(found, 0.5) == {}
    assert shown(found, 1.5) == {"uuid-0": ("?", None)}
    assert shown(found, 2.5) == {"uuid-0": ("ctx", None), "uuid-1": ("own", None)}
    assert shown(found, 3.0) == {"uuid-0": ("ctx", 0), "uuid-1": ("own", 5 * MIB)}
    assert shown(found, 4.9) == {"uuid-0": ("STRAY", MIB), "uuid-1": ("own", 6 * MIB)}
    assert shown(found, 6.0) == {"uuid-0": ("STRAY", 2 * MIB), "uuid-1": ("own", 6 * MIB)}
    assert shown(found, 6.1) == {}  # it has ended
    assert [round(time - START, 3) for time in found.times()] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 6.0]


def test_lines_out_of_order_are_put_in_order(tmp_path: Path) -> None:
    log = Log(tmp_path, 1)
    log.state(1.0, "cuda:1", ["cuda:1"])
    log.sample(4.0, {"cuda:1": 4})
    log.sample(2.0, {"cuda:1": 2})
    log.end(6.0)
    assert [shown(track(tmp_path), time)["uuid-1"] for time in (3.0, 5.0)] == [("own", 2), ("own", 4)]


def test_a_process_that_has_not_named_its_gpus_is_known_by_their_names(tmp_path: Path) -> None:
    log = Log(tmp_path, 1)
    log.state(1.0, "cuda:1", ["cuda:0"], gpus={})
    log.sample(2.0, {"cuda:0": 7})
    assert shown(track(tmp_path), 2.0) == {"cuda:0": ("STRAY", 7)}


@pytest.mark.parametrize("time", [None, 0.0])
def test_a_log_without_a_time_begins_with_what_it_says_first(tmp_path: Path, time: float | None) -> None:
    log = Log(tmp_path, 1, **({} if time is None else {"time": time - START}))
    log.write('{"process": {"pid": 1, "host": "here", "command": "x"}}')
    log.state(3.0, "cuda:1", ["cuda:1"])
    found = track(tmp_path)
    assert found.start <= START + 3.0
    assert shown(found, 3.0) == {"uuid-1": ("own", None)}
