"""The worst moment, the peaks, and the moments that stand for a long run."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from devguard.watch.cells import FAULTS
from devguard.watch.report import run
from devguard.watch.report.history import History
from tests.helpers.journals import MIB, START, Log, make_run


def history(folder: Path, most: int = 100) -> History:
    return run.read(folder, most).history


def seconds(times: list[float]) -> list[float]:
    return [round(time - START, 2) for time in times]


def test_the_worst_moment_is_the_one_with_most_on_gpus_of_others(tmp_path: Path) -> None:
    found = history(make_run(tmp_path))
    assert (found.worst.bytes, found.worst.places, found.worst.time) == (7 * MIB + 512, 2, START + 6.0)
    assert found.worst.held == (100 + 210 + 300 + 400 + 7) * MIB + 512
    assert {uuid: (peak.bytes, peak.time - START) for uuid, peak in found.peaks.items()} == {
        "uuid-0": (107 * MIB + 512, 6.0),
        "uuid-1": (210 * MIB, 6.0),
        "uuid-2": (300 * MIB, pytest.approx(2.6)),
        "uuid-3": (400 * MIB, pytest.approx(2.7)),
    }
    assert found.misplaced == {(1, "uuid-0"): 7 * MIB + 512, (2, "uuid-0"): 0}
    assert (found.first, found.last) == (START, START + 10.0)


def test_a_healthy_run_is_worst_when_it_holds_most(tmp_path: Path) -> None:
    log = Log(tmp_path, 1)
    log.state(1.0, "cuda:1", ["cuda:1"])
    for time, size in ((2.0, 5), (3.0, 9), (4.0, 7)):
        log.sample(time, {"cuda:1": size})
    assert (history(tmp_path).worst.time, history(tmp_path).worst.held) == (START + 3.0, 9)


def test_without_samples_the_contexts_count(tmp_path: Path) -> None:
    log = Log(tmp_path, 1)
    log.state(1.0, "cuda:1", ["cuda:1"])
    log.state(2.0, "cuda:1", ["cuda:1", "cuda:0"])
    log.state(3.0, "cuda:1", ["cuda:1"])
    found = history(tmp_path)
    assert (found.worst.time, found.worst.bytes, found.worst.places, found.worst.cells) == (START + 2.0, 0, 1, 2)


def test_memory_of_processes_one_after_the_other_is_not_summed(tmp_path: Path) -> None:
    for pid, time in ((1, 0.0), (2, 10.0)):
        log = Log(tmp_path, pid, time)
        log.state(time + 1, "cuda:1", ["cuda:0"])
        log.sample(time + 2, {"cuda:0": 5 * MIB})
        log.end(time + 5)
    found = history(tmp_path)
    assert found.worst.bytes == 5 * MIB
    assert found.peaks["uuid-0"].bytes == 5 * MIB


def test_a_killed_process_holds_its_memory_until_the_end_that_another_one_noted(tmp_path: Path) -> None:
    found = history(make_run(tmp_path))
    killed = found.tracks[3]
    assert (killed.end, killed.last) == (START + 9.0, START + 2.7)
    assert killed.cells(START + 8.9)["uuid-3"].bytes == 400 * MIB
    assert killed.cells(START + 9.1) == {}


def test_a_killed_process_counts_to_the_end_of_its_run_and_not_into_the_next_one(tmp_path: Path) -> None:
    killed, beside, later = Log(tmp_path, 1), Log(tmp_path, 2), Log(tmp_path, 3, 100.0)
    killed.state(1.0, "cuda:1", ["cuda:0"])
    killed.sample(2.0, {"cuda:0": MIB})
    beside.state(1.0, "cuda:2", ["cuda:2"])
    beside.sample(7.0, {"cuda:2": MIB})
    later.state(101.0, "cuda:3", ["cuda:3"])
    later.sample(102.0, {"cuda:3": MIB})
    found = history(tmp_path)
    assert [track.end for track in found.tracks] == [START + 7.0, START + 7.0, START + 102.0]
    assert found.last == START + 102.0


def test_a_long_history_is_shown_by_the_worst_moments_of_its_parts(tmp_path: Path) -> None:
    draw = random.Random(3)
    logs = [Log(tmp_path, pid, pid / 100) for pid in range(1, 5)]
    for pid, log in enumerate(logs, 1):
        log.state(1.0, f"cuda:{pid % 4}", ["cuda:0", f"cuda:{pid % 4}"])
        for number in range(300):
            log.sample(2.0 + number + pid / 10, {"cuda:0": draw.randrange(MIB), f"cuda:{pid % 4}": draw.randrange(MIB)})
        log.end(303.0)
    full, thin = history(tmp_path, 10_000), history(tmp_path, 20)
    every = full.moments(10_000)
    assert len(every) == full.count == 1206
    assert len(thin.moments(100)) == 20
    assert (thin.worst, thin.peaks, thin.misplaced) == (full.worst, full.peaks, full.misplaced)
    assert thin.worst.time in thin.moments(100)
    assert full.worst.time in full.moments(7)
    assert len(full.moments(7)) <= 7
    for uuid, peak in full.peaks.items():
        for kept in (thin.points(uuid, 100), thin.points(uuid, 6), full.points(uuid, 6)):
            assert peak.time in kept
        assert len(thin.points(uuid, 6)) <= 6
    # What the sweep adds up step by step is what the processes hold at each moment.
    for time in every[:: len(every) // 40]:
        cells = [cell for track in full.tracks for cell in track.cells(time).values()]
        astray = sum(cell.bytes or 0 for cell in cells if cell.verdict in FAULTS)
        assert astray <= full.worst.bytes
    assert (
        max(
            sum(c.bytes or 0 for t in full.tracks for c in t.cells(time).values() if c.verdict in FAULTS)
            for time in every
        )
        == full.worst.bytes
    )


def test_what_is_held_at_the_start_of_a_part_counts_there(tmp_path: Path) -> None:
    log = Log(tmp_path, 1)
    log.state(1.0, "cuda:1", ["cuda:1"])
    for number in range(30):
        log.sample(2.0 + number / 100, {"cuda:1": 50 - number})
    log.sample(100.0, {"cuda:1": 60})
    found = history(tmp_path, 10)
    assert len(found.points("uuid-1", 10)) == 10  # also for the quiet parts
    assert [
        track.cells(time)["uuid-1"].bytes for track in found.tracks for time in found.points("uuid-1", 10)[1:-1]
    ] == [21] * 8


def test_an_empty_history_has_no_moment() -> None:
    found = History([], {}, 10)
    assert (found.moments(5), found.points("x", 5), found.peaks, found.count) == ([], [], {}, 0)


def test_a_killed_process_holds_its_memory_until_the_processes_that_were_started_with_it_stop(tmp_path: Path) -> None:
    first = Log(tmp_path, 1, 0.0, parent=7)
    first.state(1.0, "cuda:0", ["cuda:0"])
    first.sample(2.0, {"cuda:0": 5 * MIB})  # and holds it from then on, which writes nothing
    second = Log(tmp_path, 2, 4.0, parent=7)
    second.sample(9.0, {"cuda:0": MIB})
    for pid, time, parent in ((3, 500.0, 7), (4, 20.0, 8)):  # of later runs
        Log(tmp_path, pid, time, parent=parent).sample(time + 1.0, {"cuda:0": MIB})
    assert [track.end for track in history(tmp_path).tracks][:2] == [START + 9.0, START + 9.0]
